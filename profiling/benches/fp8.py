"""Benches of FP8 products against bf16: linear layers, transformer blocks, and the losses of a whole run.

`fp8`: products of VTP's blocks (M tokens, K inputs, N outputs), with the error of each against float32. A note has the
choice that the rule of kernels/fp8.py makes on a GPU, so that a run there checks the rule. On a GPU variants are
compiled, as blocks are; without that torchao's casts are many small kernels.

`fp8_blocks`, `fp8_blocks_wide`: whole blocks as a run has them, bf16 and torchao compiled, Transformer Engine not,
because it cannot be traced. Widths are those of vtp_l, vtp_1b and vtp_7b, tokens those of 64 (32) images of 257.

`fp8_losses`: the losses of one run in bf16 and of the same run in FP8, by the engine, from the same weights over the
same few batches of random pixels, which a model learns by heart; so the curves fall, together or apart. On a GPU vtp_l
over 200 steps.

On a CPU float8 products are emulated at some ten million multiplications a second: small sizes show that the benches
run, not what FP8 gains.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from configs import Config, UserError
from configs.model import Vit
from engine.block_transforms import convert_blocks_to_fp8
from engine.step import train_step
from kernels import fp8
from kernels.attention import resolve_attention
from kernels.fp8 import LinearBackend, LinearParameters
from model.block import Block
from model.losses.comm import Comm
from model.packing import CropGroup, PackedLayout
from model.rope import Rope
from profiling.benches.recorder import BenchRecorder, print_now
from profiling.benches.workload import build_on_one_rank, one_rank, preset_config, random_batch
from profiling.instruments.machine import by_device, describe, device, matmul_peak, require_bf16

SHAPES = {  # M, K, N
    "cpu": {"S qkv": (2056, 384, 1152), "S mlp.w12": (2056, 384, 2048), "L qkv": (2056, 1024, 3072)},
    "cuda": {
        "B qkv": (16_448, 768, 2304),
        "L qkv": (16_448, 1024, 3072),
        "L proj": (16_448, 1024, 1024),
        "L mlp.w12": (16_448, 1024, 5472),
        "7B mlp.w12": (8224, 4096, 21_856),
    },
}
RULE = LinearBackend("fp8_torchao", "", is_gated_by_speed=True)


def bench_fp8(recorder: BenchRecorder) -> None:
    """Linear layers in FP8 against bf16, one measurement for each shape."""
    require_bf16()
    for name, shape in SHAPES[device().type].items():
        _measure_fp8(name, *shape, recorder)


def _measure_fp8(name: str, m: int, k: int, n: int, recorder: BenchRecorder) -> None:
    x_MK, grad_MN = (torch.randn(m, side, device=device()).bfloat16() for side in (k, n))
    layer = nn.Linear(k, n, device=device(), dtype=torch.bfloat16)
    leaves = [x_MK.requires_grad_(), layer.weight, layer.bias]

    def step(linear: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y_MN = linear(*leaves)
        return (y_MN.detach(), *torch.autograd.grad(y_MN, leaves, grad_MN))

    linears, notes = _linears(layer)
    exact = _exact(leaves, grad_MN)
    errors = {variant: _errors(step(linear), exact) for variant, linear in linears.items()}
    assert errors["fp8_torchao"][0] < 0.1, f"no float8 error: {errors}"
    notes += [f"{variant}: off float32 by {out:.1%} (output), {max(rest):.1%} (gradients)"
              for variant, (out, *rest) in errors.items()]  # fmt: skip
    notes.append(
        f"on a GPU the rule {'leaves this in bf16: ' + why if (why := RULE.why_not_fp8(k, n, m)) else 'takes FP8'}"
    )
    where = "emulated on the CPU: slow, not a gain" if device().type == "cpu" else "compiled"
    workload = f"{name}: {m} x {k} by {k} x {n}, forward and backward; float8 {where}"
    variants = {variant: lambda linear=linear: step(linear) for variant, linear in linears.items()}
    peak = matmul_peak(torch.bfloat16)
    flops = 6.0 * m * k * n
    recorder.add(recorder.measure("fp8", workload, variants, "bf16", flops=flops, peak=peak, notes=tuple(notes)))


def _linears(layer: nn.Linear) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    """Variants that run here, and why others do not."""
    kinds: dict[str, Callable[..., Tensor]] = {"bf16": F.linear, "fp8_torchao": fp8.torchao_linear()}
    if device().type == "cuda":
        kinds = {kind: torch.compile(linear, fullgraph=True, dynamic=False) for kind, linear in kinds.items()}
    try:
        choice = fp8.resolve_linears("fp8_te", device(), torch.bfloat16, (layer.in_features, layer.out_features))
    except (ValueError, ImportError) as reason:
        return kinds, [f"without fp8_te: {reason}"]
    product = fp8.te_linear(LinearParameters(layer.weight, layer.bias, layer.out_features, layer.in_features), choice)
    in_fp8 = fp8.te_autocast(product, choice, None)
    return kinds | {"fp8_te": lambda x_MK, *_: in_fp8(x_MK)}, [f"fp8_te: {choice.recipe}"]


def _exact(leaves: list[Tensor], grad_MN: Tensor) -> list[Tensor]:
    x_MK, weight_NK, bias_N = (leaf.detach().float().requires_grad_() for leaf in leaves)
    y_MN = F.linear(x_MK, weight_NK, bias_N)
    return [y_MN.detach(), *torch.autograd.grad(y_MN, [x_MK, weight_NK, bias_N], grad_MN.float())]


def _errors(found: tuple[Tensor, ...], exact: list[Tensor]) -> list[float]:
    """Relative errors of output, input gradient and weight gradient: norm of the difference over that of the truth."""
    pairs = list(zip(found, exact, strict=True))[:3]
    return [((ours.float() - truth).norm() / truth.norm()).item() for ours, truth in pairs]


L = by_device(cuda={"L": (1024, 16, 64)}, cpu={"tiny": (64, 2, 1)})  # name: width, heads, images
WIDER = by_device(cuda={"1B": (1536, 24, 64), "7B": (4096, 32, 32)}, cpu={"tiny": (64, 2, 1)})
DEPTH, PATCHES = 2, by_device(cuda=(16, 16), cpu=(4, 4))
WANTED = {"L": 1.15, "1B": 1.3, "7B": 1.3}  # times the speed of bf16


def bench_fp8_blocks(recorder: BenchRecorder) -> None:
    """Blocks of vtp_l's width in FP8 against bf16."""
    _run(L, recorder)


def bench_fp8_blocks_wide(recorder: BenchRecorder) -> None:
    """Blocks of the widths of vtp_1b and vtp_7b in FP8 against bf16."""
    _run(WIDER, recorder)


def _run(trunks: dict[str, tuple[int, int, int]], recorder: BenchRecorder) -> None:
    require_bf16()
    for name, (width, heads, images) in trunks.items():
        _measure_fp8_blocks(name, width, heads, images, recorder)


def _measure_fp8_blocks(name: str, width: int, heads: int, images: int, recorder: BenchRecorder) -> None:
    tower = BlockTower(width, heads, images)
    plain = tower.blocks()
    towers, notes = {"bf16": plain}, []
    for kind in ("fp8_torchao", "fp8_te"):
        blocks = copy.deepcopy(plain)
        try:
            notes.append(convert_blocks_to_fp8([(block, tower.layout.tokens) for block in blocks], kind, device()))
        except UserError as reason:
            notes.append(f"without {kind}: {reason}")
            continue
        towers[kind] = blocks
    outputs = {kind: tower.output(blocks) for kind, blocks in towers.items()}
    variants = {kind: tower.step(blocks, is_compiled=kind != "fp8_te") for kind, blocks in towers.items()}
    for kind, output_TD in outputs.items():
        error = float((output_TD - outputs["bf16"]).norm() / (outputs["bf16"] - tower.x_TD.detach().float()).norm())
        assert error < 0.2, f"{kind} is off bf16 by {error:.0%} of what the blocks add"
        notes += [f"{kind}: off bf16 by {error:.1%} of what the blocks add"] * (kind != "bf16")
    workload = f"{name}: {DEPTH} blocks of {width}, {tower.layout.tokens} tokens, forward and backward"
    flops, peak = tower.flops(plain), matmul_peak(torch.bfloat16)
    result = recorder.measure("fp8_blocks", workload, variants, "bf16", flops=flops, peak=peak, notes=tuple(notes))
    gains = {row.variant: row.speedup for row in result.rows if row.variant != "bf16" and row.speedup is not None}
    if name in WANTED and gains:
        notes.append(f"wanted {WANTED[name]} x bf16; the best here {max(gains.values()):.2f} x")
    recorder.add(replace(result, notes=tuple(notes)))


class BlockTower:
    """Blocks of one width over packed images, and the tokens themselves."""

    def __init__(self, width: int, heads: int, images: int) -> None:
        used = images * (1 + PATCHES[0] * PATCHES[1])
        self.layout = PackedLayout((CropGroup("clip", images, 1 + PATCHES[0] * PATCHES[1], PATCHES),), pad=-used % 16)
        self.vit, self.images = Vit(width=width, depth=DEPTH, heads=heads), images
        self.rope_2TE = Rope(width // heads, 100.0, torch.bfloat16).packed(self.layout, device())
        self.x_TD = torch.randn(self.layout.tokens, width, device=device()).bfloat16().requires_grad_()

    def blocks(self) -> nn.ModuleList:
        """With random weights."""
        backend = resolve_attention("auto", device(), torch.bfloat16).name
        blocks = nn.ModuleList(Block(self.vit, backend) for _ in range(DEPTH)).to(device(), torch.bfloat16)
        for parameter in blocks.parameters():
            nn.init.normal_(parameter, std=0.02)
        return blocks

    def flops(self, blocks: nn.ModuleList) -> float:
        """FLOPs, forward and backward: products with weights, and attention's two in each segment."""
        weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
        length = self.layout.groups[0].length
        return 6.0 * self.layout.tokens * weights + 12.0 * DEPTH * self.images * length**2 * self.vit.width

    def output(self, blocks: nn.ModuleList) -> Tensor:
        """(T, D) float32, without gradient."""
        with torch.no_grad():
            return self._through(blocks).float()

    def step(self, blocks: nn.ModuleList, is_compiled: bool) -> Callable[[], object]:
        """A forward and a backward pass; compiling changes the blocks' forward from here on."""
        leaves = [self.x_TD, *blocks.parameters()]
        if is_compiled:
            for block in blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        return lambda: torch.autograd.grad(self._through(blocks).float().sum(), leaves)

    def _through(self, blocks: nn.ModuleList) -> Tensor:
        y_TD = self.x_TD
        for block in blocks:
            y_TD = block(y_TD, self.rope_2TE, self.layout.segments)
        return y_TD


PRESET, CLIP, STEPS = by_device(cuda=("vtp_l", 32, 200), cpu=("study_mini", 8, 6))
SMALL = tuple(f"model.{tower}.{side}" for tower in ("trunk", "decoder", "text") for side in ("width=32", "depth=1"))
# The rate is as the preset has it at its own batch.
SHORT = (f"optim.steps={STEPS}", f"optim.lr_batch={CLIP}", *by_device(cuda=(), cpu=SMALL))
NUM_BATCHES = by_device(cuda=8, cpu=2)
KINDS = ("bf16", "fp8_torchao", "fp8_te")
LAST = 20  # steps whose mean is compared


@dataclass(frozen=True)
class LossCurves:
    """`losses`: the total loss of every step, by kind of product."""

    workload: str
    losses: dict[str, list[float]]
    notes: tuple[str, ...] = ()

    def as_table(self) -> Table:
        """About every tenth of the steps."""
        table = Table(title=f"fp8_losses: {self.workload}", title_justify="left")
        for column in ("step", *self.losses):
            table.add_column(column, justify="right")
        steps = len(self.losses["bf16"])
        for step in sorted({0, steps - 1, *range(0, steps, max(1, steps // 10))}):
            table.add_row(str(step), *(f"{curve[step]:.4f}" for curve in self.losses.values()))
        return table

    def as_dict(self) -> dict[str, Any]:
        """Every step."""
        about = {"name": "fp8_losses", "workload": self.workload, "machine": describe()}
        return about | {"losses": self.losses, "notes": list(self.notes)}


def bench_fp8_losses(recorder: BenchRecorder) -> None:
    """Losses of a run for each kind of product; the number of rounds is ignored."""
    require_bf16()
    with one_rank() as comm:
        _curves(comm, recorder)


def _curves(comm: Comm, recorder: BenchRecorder) -> None:
    losses: dict[str, list[float]] = {}
    notes: list[str] = []
    workload = f"{PRESET}, {CLIP} clip images a step, {STEPS} steps over {NUM_BATCHES} batches of random pixels"
    for kind in KINDS:
        compiles = "off" if kind == "fp8_te" else "on"
        config = preset_config(PRESET, CLIP, *SHORT, f"system.linear={kind}", f"system.compile={compiles}")
        try:
            losses[kind] = _losses(config, comm)
            print_now(
                f"fp8_losses: {kind}: {losses[kind][0]:.4f} at the first step, {losses[kind][-1]:.4f} at the last"
            )
            recorder.save(LossCurves(workload, losses, tuple(notes)))
        except UserError as reason:
            notes.append(f"without {kind}: {reason}")
        gc.collect()
    notes += [_compared(kind, losses["bf16"], curve) for kind, curve in losses.items() if kind != "bf16"]
    recorder.add(LossCurves(workload, losses, tuple(notes)))


def _losses(config: Config, comm: Comm) -> list[float]:
    parts = build_on_one_rank(config, comm)
    batches = [random_batch(config, seed) for seed in range(NUM_BATCHES)]
    centres, found = parts.centres, []
    for step in range(STEPS):
        record = train_step(parts, replace(batches[step % NUM_BATCHES], step=step), centres, config)
        centres = record.centres
        found.append(record.losses["total"])
    return [float(loss) for loss in found]


def _compared(kind: str, plain: list[float], other: list[float]) -> str:
    late, its_late = statistics.fmean(plain[-LAST:]), statistics.fmean(other[-LAST:])
    worst = max(abs(a - b) / abs(a) for a, b in zip(plain, other, strict=True))
    return (
        f"{kind}: {its_late / late - 1:+.2%} of bf16's loss over the last {len(plain[-LAST:])} steps, at most "
        f"{worst:.2%} apart at any; bf16's falls from {plain[0]:.3f} to {late:.3f}"
    )
