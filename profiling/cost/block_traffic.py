"""Bytes that a transformer block moves beside its products, and that it keeps for its backward.

    block_traffic(config.model.trunk, "bf16", compiled_for=None).forward  # PassTraffic(bytes=59953.9, operations=41)
    kept_bytes(config.model.trunk, "bf16", is_compiled=True)              # 13824 a token, from forward to backward

Norms, RoPE, gates, residual sums and casts compute little and move much: on most devices a third of a step. Eager: the
block runs once, forward and backward, on tensors without memory, and operands and results of every operator are added
up. Compiled: Inductor keeps intermediates of fused operations in registers and recomputes what is cheap; the numbers
below were counted in the code that it generates for a CPU and for sm_90 (profiling/benches/block_kernels.py), which a
test repeats. Operands of products, and all that attention does between q, k, v and its result, are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.model import Text, Vit
from kernels.attention import Spans
from model.block import Block, swiglu_hidden
from model.text import TextBlock
from profiling.cost.operator_trace import OperatorTrace, default_dtype

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEGMENTS, LENGTH = 64, 64  # of the traced run: many tokens, so that what goes with weights does not show
BACKENDS = {"cpu": "sdpa", "cuda": "varlen"}  # attention in the compiled blocks that were counted
# (widths, hidden widths, kernels) that compiled code moves a token beside products, forward and backward; torch 2.11
# and 2.13, RMSNorm. LayerNorm's backward on a GPU has 2 widths more.
FUSED: dict[str, dict[type, tuple[tuple[float, float, int], ...]]] = {
    "cpu": {Vit: ((14, 3, 5), (33.5, 5, 13)), Text: ((9, 2, 5), (28, 3, 12))},
    "cuda": {Vit: ((14, 3, 6), (19, 5.1, 13)), Text: ((9, 2, 4), (27.3, 3, 16))},
}
FUSED_KEEPS: dict[type, tuple[float, float]] = {
    Vit: (10, 3),
    Text: (8.1, 2),
}  # (widths, hidden widths) kept a token for the backward


@dataclass(frozen=True)
class PassTraffic:
    """Bytes and operations of one pass through a block, products excluded."""

    bytes: float  # a token
    operations: int


@dataclass(frozen=True)
class BlockTraffic:
    """Traffic of one block, forward and backward."""

    forward: PassTraffic
    backward: PassTraffic


@cache
def block_traffic(part: Vit | Text, precision: str, compiled_for: str | None) -> BlockTraffic:
    """Traffic of a block of trunk, decoder or text tower with fused attention; compiled for "cpu" or "cuda", or
    eager."""
    if compiled_for is not None:
        return BlockTraffic(*(
            PassTraffic(_elements(part, widths, hidden) * DTYPES[precision].itemsize, kernels)
            for widths, hidden, kernels in FUSED[compiled_for][type(part)]
        ))  # fmt: skip
    with default_dtype(DTYPES[precision]), FakeTensorMode():
        run, x_TD, _ = traced_block(part)
        trace = OperatorTrace(with_traffic=True)
        with trace.phase("forward"):
            y_TD = run(x_TD)
        seed_TD = torch.ones_like(y_TD)
        with trace.phase("backward"):
            y_TD.backward(seed_TD)
    return BlockTraffic(*(
        PassTraffic(moved / len(x_TD), operations)
        for moved, operations in (elementwise_traffic(trace, phase) for phase in ("forward", "backward"))
    ))  # fmt: skip


def elementwise_traffic(trace: OperatorTrace, phase: str) -> tuple[int, int]:
    """Bytes moved beside products, and number of operations, in a phase."""
    events = [event for event in trace.events if event.moved and event.phase == phase]
    return sum(event.moved - event.product for event in events), len(events)


@cache
def kept_bytes(part: Vit | Text, precision: str, is_compiled: bool) -> float:
    """Bytes a token that one block keeps for its backward without checkpointing, parameters not among them."""
    if is_compiled:
        return _elements(part, *FUSED_KEEPS[type(part)]) * DTYPES[precision].itemsize
    with default_dtype(DTYPES[precision]), FakeTensorMode():
        run, x_TD, parameters = traced_block(part)
        kept: dict[int, Tensor] = {}  # holding them keeps their storages' numbers theirs
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(_storage(x), x), lambda x: x):
            run(x_TD)
        sizes = (x.untyped_storage().nbytes() for number, x in kept.items() if number not in map(_storage, parameters))
        return sum(sizes) / len(x_TD)


def traced_block(part: Vit | Text, backend: str = "sdpa") -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """A block's forward, its input, and what exists without it: parameters, and RoPE or the spans."""
    x_TD = torch.empty(SEGMENTS * LENGTH, part.width, requires_grad=True)
    segments = ((SEGMENTS, LENGTH),)
    if isinstance(part, Vit):
        rope_2TE = torch.empty(2, SEGMENTS * LENGTH, part.width // part.heads)
        block = Block(part.model_copy(update={"drop_path": 0.0}), backend)
        return lambda x: block(x, rope_2TE, segments), x_TD, [rope_2TE, *block.parameters()]
    text = TextBlock(part, backend)
    ids_RC = torch.zeros(SEGMENTS, LENGTH, dtype=torch.int32)
    spans = Spans(ids_RC, torch.arange(0, SEGMENTS * LENGTH + 1, LENGTH, dtype=torch.int32))
    return lambda x: text(x, segments, spans), x_TD, [*spans, *text.parameters()]


def _elements(part: Vit | Text, widths: float, hidden_widths: float) -> float:
    is_vit = isinstance(part, Vit)
    hidden = swiglu_hidden(part.width, part.mlp_ratio) if is_vit else int(part.width * part.mlp_ratio)
    return widths * part.width + hidden_widths * hidden


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
