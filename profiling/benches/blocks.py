"""Benches of transformer parts, forward and backward: attention, text packing, compiling, stochastic depth, MAR's
encoder.

The workloads are a part of a ViT-S step at 256 px: segments of 257 tokens (clip, ssl global) and of 37 (ssl local).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from configs.generator import Autoregressive
from configs.model import Vit
from engine.build import compile_blocks
from engine.random_draws import DropPathDraws
from kernels.attention import (
    DENSE_KERNELS,
    REQUIREMENTS,
    activated,
    attend,
    attend_reference,
    resolve_attention,
    why_unavailable,
)
from model.block import Block
from model.generator.autoregressive_networks import MaskedBackbone
from model.generator.tokens import max_visible, mean_mask_ratio
from model.initialise import initialise
from model.packing import CropGroup, PackedLayout, kept_segments
from model.rope import Rope
from model.text import PackedCaptions, TextTower, one_caption_per_row, pack_captions
from model.trunk import Trunk
from profiling.benches.recorder import BenchRecorder
from profiling.benches.workload import small_step
from profiling.cost.step_trace import random_captions
from profiling.instruments.machine import by_device, compared_dtypes, device, precision_label, training_dtype

# --- attention: every backend that runs on this device ----------------------------------------------------------------

SEGMENTS = by_device(cpu=((12, 257), (16, 37)), cuda=((192, 257), (256, 37)))
HEADS, HEAD_WIDTH = by_device(cpu=6, cuda=16), 64  # of a ViT-S, on a GPU of a ViT-L


def bench_attention(recorder: BenchRecorder) -> None:
    """One measurement a dtype; where FlashAttention 3 is installed another, with it instead of torch's kernel."""
    for dtype in compared_dtypes():
        _measure_attention(dtype, "varlen", recorder)
        if why_unavailable("flash3", device(), dtype) is None:
            _measure_attention(dtype, "flash3", recorder)


def _measure_attention(dtype: torch.dtype, kernel: str, recorder: BenchRecorder) -> None:
    tokens = sum(count * length for count, length in SEGMENTS)
    q, k, v = (torch.randn(tokens, HEADS, HEAD_WIDTH, device=device()).to(dtype).requires_grad_() for _ in range(3))

    def step(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, SEGMENTS, backend=backend).float().sum(), (q, k, v))

    obstacles = {name: why_unavailable(name, device(), dtype) for name in REQUIREMENTS}
    named = ("flash3",) if kernel == "flash3" else tuple(name for name in REQUIREMENTS if name != "flash3")
    backends = [*DENSE_KERNELS, *(name for name in named if obstacles[name] is None)]
    want = attend_reference(q.detach().float(), k.detach().float(), v.detach().float(), SEGMENTS)
    sizes = " + ".join(f"{count} segments of {length}" for count, length in SEGMENTS)
    workload = f"{sizes} tokens, {HEADS} heads of {HEAD_WIDTH}, {dtype}, forward and backward"
    workload += "; FlashAttention 3 under torch's flash operators" * (kernel == "flash3")
    variants = {backend: lambda backend=backend: step(backend) for backend in backends}
    notes = tuple(f"not here: {name}, {reason}" for name, reason in obstacles.items() if reason is not None)
    with activated(kernel):  # under sdpa, too, and outside of what is timed
        for backend in backends:
            torch.testing.assert_close(attend(q, k, v, SEGMENTS, backend=backend).float(), want, atol=2e-2, rtol=2e-2)
        recorder.add(recorder.measure("attention", workload, variants, "sdpa", notes=notes))


# --- text: captions packed into rows against padded to the context ----------------------------------------------------

CAPTIONS = 32


def bench_text(recorder: BenchRecorder) -> None:
    """The text tower on captions as long as the web's, eager and compiled."""
    text = small_step().model.text
    captions_BC = random_captions(CAPTIONS, text.context, text.vocab, torch.Generator().manual_seed(0))
    packed, padded = pack_captions(captions_BC).to(device()), one_caption_per_row(captions_BC).to(device())
    eager, compiled = _text_tower(), _text_tower()
    compile_blocks(compiled)
    torch.testing.assert_close(eager(packed), eager(padded), atol=0.05, rtol=0.05)  # bf16
    mean = (captions_BC.argmax(dim=1) + 1).float().mean().item()
    slots = " x ".join(str(size) for size in packed.tokens_RC.shape)
    workload = (
        f"{CAPTIONS} captions of {mean:.1f} tokens on average, context {text.context}, packed into {slots} slots, "
        f"{text.depth} blocks of {text.width}, {precision_label()}, forward and backward"
    )
    variants = {
        f"{layout}, {mode}": partial(_text_step, tower, captions)
        for mode, tower in (("eager", eager), ("compiled", compiled))
        for layout, captions in (("padded", padded), ("packed", packed))
    }
    notes = (f"packing leaves out {packed.saved_fraction(captions_BC):.0%} of the token slots",)
    recorder.add(recorder.measure("text", workload, variants, "padded, eager", notes=notes))


def _text_tower() -> TextTower:
    config = small_step()
    tower = TextTower(
        config.model.text, config.model.clip_width, resolve_attention("auto", device(), training_dtype()).name
    )
    initialise(nn.ModuleDict({"text": tower}), config)
    return tower.to(device(), training_dtype())


def _text_step(tower: TextTower, captions: PackedCaptions) -> tuple[Tensor, ...]:
    weights = [parameter for name, parameter in tower.named_parameters() if "embedding" not in name]
    return torch.autograd.grad(tower(captions).float().pow(2).sum(), weights)


# --- compile: speed, seconds to compile, graphs and breaks ------------------------------------------------------------

CROPS = {"clip": (8, 256), "ssl_local": (16, 96)}  # name: crops, side in pixels


def bench_compile(recorder: BenchRecorder) -> None:
    """A ViT-S trunk over packed crops of a step, eager and compiled."""
    eager, compiled = _trunk(), _trunk()
    crops = {name: torch.randn(count, 3, size, size, device=device()) for name, (count, size) in CROPS.items()}
    compile_blocks(compiled)
    counters.clear()
    begin = time.perf_counter()
    torch.testing.assert_close(trunk_value(compiled, crops), trunk_value(eager, crops), atol=0, rtol=0.02)  # bf16
    trunk_step(compiled, crops)()
    seconds = time.perf_counter() - begin
    stats = f"{counters['stats']['unique_graphs']} graphs, {sum(counters['graph_break'].values())} breaks"
    workload = f"ViT-S trunk, {eager.layout(crops).tokens} tokens, {precision_label()}, forward and backward"
    variants = {"eager": trunk_step(eager, crops), "compiled": trunk_step(compiled, crops)}
    notes = (f"first compiled step, caches included: {seconds:.0f} s; {stats}",)
    recorder.add(recorder.measure("compile", workload, variants, "eager", notes=notes))


def _trunk() -> Trunk:
    config = small_step()
    trunk = Trunk(config.model, resolve_attention("auto", device(), training_dtype()).name)
    initialise(trunk, config)
    return trunk.to(device(), training_dtype())


def trunk_value(trunk: Trunk, crops: dict[str, Tensor]) -> Tensor:
    """A number that depends on every token of the trunk's output."""
    return trunk(crops, {}).float().pow(2).mean()


def trunk_step(trunk: Trunk, crops: dict[str, Tensor]) -> Callable[[], object]:
    """A forward and a backward pass, to the weights of the blocks."""
    weights = list(trunk.blocks.parameters())
    return lambda: torch.autograd.grad(trunk_value(trunk, crops), weights)


# --- depth: stochastic depth does not compute what it drops -----------------------------------------------------------

GROUPS = (CropGroup("clip", 10, 257, (16, 16)), CropGroup("ssl_local", 20, 37, (6, 6)))
VIT = {"width": 384, "depth": 4, "heads": 6}
RATE = 0.3


def bench_depth(recorder: BenchRecorder) -> None:
    """One measurement a dtype; the note compares the time at rate 0.3 with the fraction of tokens that stay."""
    for dtype in compared_dtypes():
        _measure_depth(dtype, recorder)


def _measure_depth(dtype: torch.dtype, recorder: BenchRecorder) -> None:
    used = sum(group.segments * group.length for group in GROUPS)
    layout, vit = PackedLayout(GROUPS, pad=-used % 16), Vit(**VIT, drop_path=RATE)
    backend = resolve_attention("auto", device(), dtype).name
    blocks = nn.ModuleList(Block(vit, backend) for _ in range(vit.depth)).to(device(), dtype)
    _randomise(blocks)
    rope_2TE = Rope(vit.width // vit.heads, 100.0, torch.bfloat16).packed(layout, device())
    x_TD = torch.randn(layout.tokens, vit.width, device=device()).to(dtype).requires_grad_()
    kept = kept_segments(layout.segments, RATE)
    drawn = DropPathDraws(layout.segments, RATE, vit.depth, seed=0, rank=0).draw(0).to(device())
    tokens_L2K = kept.tokens(drawn, layout.segments)

    def step(tokens: Tensor | None) -> None:
        y_TD = x_TD
        for block, tokens_2K in zip(blocks, tokens if tokens is not None else [None] * vit.depth, strict=True):
            y_TD = block(y_TD, rope_2TE, layout.segments, tokens_2K)
        y_TD.float().sum().backward()

    fraction = kept.used / used
    sizes = " + ".join(f"{group.segments} segments of {group.length}" for group in GROUPS)
    workload = f"{sizes} tokens, {vit.depth} blocks of width {vit.width}, {dtype}, forward and backward"
    variants = {"rate 0": partial(step, None), f"rate {RATE}": partial(step, tokens_L2K)}
    result = recorder.measure("depth", workload, variants, "rate 0")
    speedup = result.rows[1].speedup
    assert speedup is not None
    ideal = f"ideally {1 / fraction:.2f} times the speed; {speedup * fraction:.0%} of that"
    recorder.add(replace(result, notes=(f"{fraction:.0%} of the tokens stay: {ideal}",)))


def _randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


# --- masked: what the fixed shape of MAR's encoder costs --------------------------------------------------------------

SECTION = Autoregressive(width=384, depth=4, heads=6)
TOKENS, CHANNELS, SAMPLES = 256, 16, 8


def bench_masked(recorder: BenchRecorder) -> None:
    """MAR's transformer with encoders of different length, all with the same result; one measurement a dtype.

    exact     as many tokens as are known on average: another shape every step, and one number for all samples
    filled    the most that may be known, 30 %, the rest in a span of its own (model/generator)
    full      all tokens, unknown ones in a span of their own
    """
    for dtype in compared_dtypes():
        _measure_masked(dtype, recorder)


def _measure_masked(dtype: torch.dtype, recorder: BenchRecorder) -> None:
    backbone = MaskedBackbone(SECTION, CHANNELS, TOKENS, 1, resolve_attention("auto", device(), dtype).name).to(
        device(), dtype
    )
    _randomise(backbone)
    tokens_BNC = torch.randn(SAMPLES, TOKENS, CHANNELS, device=device())
    order_BN = torch.rand(SAMPLES, TOKENS, device=device()).argsort(dim=1)
    known = round(TOKENS * (1 - mean_mask_ratio(SECTION.mask_ratio)))
    known_B, labels_B = (torch.full((SAMPLES,), value, device=device()) for value in (known, 0))

    def conditions(length: int) -> Tensor:
        return backbone(tokens_BNC[:, :length], order_BN, known_B, labels_B)

    def step(length: int) -> None:
        conditions(length).float().square().mean().backward()

    lengths = {"exact": known, "filled": max_visible(TOKENS, SECTION.mask_ratio), "full": TOKENS}
    exact, *others = [conditions(length).detach() for length in lengths.values()]
    for other in others:
        torch.testing.assert_close(exact, other, rtol=0, atol=0.05)
    sizes = ", ".join(f"{SECTION.buffer} + {length} ({name})" for name, length in lengths.items())
    blocks = f"{SECTION.depth} blocks of width {SECTION.width}"
    workload = f"{SAMPLES} samples of {TOKENS} tokens, {blocks}, {dtype}: {sizes}"
    variants = {name: partial(step, length) for name, length in lengths.items()}
    recorder.add(recorder.measure("masked", workload, variants, "full"))
