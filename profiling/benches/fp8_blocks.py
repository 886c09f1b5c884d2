"""Whole transformer blocks with FP8 products against the same blocks in bf16, forward and backward, as a run has them:
bf16 and torchao compiled, Transformer Engine not, because it cannot be traced.

The widths are those of the trunks of vtp_l, vtp_1b and vtp_7b, the tokens those of 64 (32) images of 257. On a CPU
float8 products are emulated at some ten million multiplications a second: a small block shows that the bench runs, and
nothing of the gain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from configs import UserError
from configs.architecture import Vit
from engine.linears import convert_blocks
from kernels.attention import resolve
from model.block import Block
from model.pack import Group, Layout
from model.rope import Rope
from profiling.machine import device, matmul_peak, require_bf16, sized
from profiling.measurement import Recorder

L = sized(cuda={"L": (1024, 16, 64)}, cpu={"tiny": (64, 2, 1)})  # name: width, heads, images
WIDER = sized(cuda={"1B": (1536, 24, 64), "7B": (4096, 32, 32)}, cpu={"tiny": (64, 2, 1)})
DEPTH, PATCHES = 2, sized(cuda=(16, 16), cpu=(4, 4))
WANTED = {"L": 1.15, "1B": 1.3, "7B": 1.3}  # times the speed of bf16


def run(recorder: Recorder) -> None:
    """One measurement, of vtp_l's width."""
    _run(L, recorder)


def run_wide(recorder: Recorder) -> None:
    """One measurement a width, those of vtp_1b and vtp_7b."""
    _run(WIDER, recorder)


def _run(trunks: dict[str, tuple[int, int, int]], recorder: Recorder) -> None:
    require_bf16()
    for name, (width, heads, images) in trunks.items():
        _measure(name, width, heads, images, recorder)


def _measure(name: str, width: int, heads: int, images: int, recorder: Recorder) -> None:
    tower = Tower(width, heads, images)
    plain = tower.blocks()
    towers, notes = {"bf16": plain}, []
    for kind in ("fp8_torchao", "fp8_te"):
        blocks = copy.deepcopy(plain)
        try:
            notes.append(convert_blocks([(block, tower.layout.tokens) for block in blocks], kind, device()))
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
    found = recorder.measure("fp8_blocks", workload, variants, "bf16", flops=flops, peak=peak, notes=tuple(notes))
    gains = {row.variant: row.speedup for row in found.rows if row.variant != "bf16" and row.speedup is not None}
    if name in WANTED and gains:
        notes.append(f"wanted {WANTED[name]} x bf16; the best here {max(gains.values()):.2f} x")
    recorder.add(replace(found, notes=tuple(notes)))


class Tower:
    """Blocks of one width over packed images, and the tokens themselves."""

    def __init__(self, width: int, heads: int, images: int) -> None:
        used = images * (1 + PATCHES[0] * PATCHES[1])
        self.layout = Layout((Group("clip", images, 1 + PATCHES[0] * PATCHES[1], PATCHES),), pad=-used % 16)
        self.vit, self.images = Vit(width=width, depth=DEPTH, heads=heads), images
        self.rope_2TE = Rope(width // heads, 100.0, torch.bfloat16).packed(self.layout, device())
        self.x_TD = torch.randn(self.layout.tokens, width, device=device()).bfloat16().requires_grad_()

    def blocks(self) -> nn.ModuleList:
        """With random weights."""
        backend = resolve("auto", device(), torch.bfloat16).name
        blocks = nn.ModuleList(Block(self.vit, backend) for _ in range(DEPTH)).to(device(), torch.bfloat16)
        for parameter in blocks.parameters():
            nn.init.normal_(parameter, std=0.02)
        return blocks

    def flops(self, blocks: nn.ModuleList) -> float:
        """Forward and backward: products with weights, and attention's two in each segment."""
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
