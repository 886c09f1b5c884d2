"""What a transformer block moves through memory beside its products, and what it keeps of that for its backward.

    block_traffic(config.model.trunk, "bf16", compiled_for=None).forward  # Traffic(bytes=59953.9, operations=41)
    kept_bytes(config.model.trunk, "bf16", is_compiled=True)              # 13824 a token, from forward to backward

Norms, RoPE, gates, residual sums and casts compute little and move much; on most devices they cost a third of a step.
Eager: the block runs once, forward and backward, on tensors without memory, and every operation's operands and results
are added up, so that no formula falls behind the model. Compiled: Inductor keeps intermediates of fused operations in
registers and recomputes what is cheap; the numbers below are counted in the code that it generates for a CPU and for
sm_90 (profiling/step/generated_code.py), which a test repeats. Operands of products, and all
that attention does between q, k, v and its result, are not in it: they belong to the time of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs.architecture import Text, Vit
from kernels.dense_attention import Spans
from model.block import Block, swiglu_hidden
from model.text import TextBlock
from profiling.step.roofline import work_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEGMENTS, LENGTH = 64, 64  # of the traced run: many tokens, so that what goes with weights does not show


@dataclass(frozen=True)
class Fused:
    """Elements a token that compiled code moves beside products: so many of the width, so many of the hidden width."""

    width: float
    hidden: float
    kernels: int

    def elements(self, width: int, hidden: int) -> float:
        """A token's, where the block is so wide and the hidden layer of its MLP so wide."""
        return self.width * width + self.hidden * hidden


# Counted in generated code (torch 2.11 and 2.13, RMSNorm; LayerNorm's backward on a GPU has 2 widths more): forward,
# backward.
FUSED = {
    "cpu": {Vit: (Fused(14, 3, 5), Fused(33.5, 5, 13)), Text: (Fused(9, 2, 5), Fused(28, 3, 12))},
    "cuda": {Vit: (Fused(14, 3, 6), Fused(19, 5.1, 13)), Text: (Fused(9, 2, 4), Fused(27.3, 3, 16))},
}
BACKENDS = {"cpu": "sdpa", "cuda": "varlen"}  # attention in the blocks that were counted


# Kept for the backward, in the same units: (width, hidden).
FUSED_KEEPS = {Vit: (10, 3), Text: (8.1, 2)}


@dataclass(frozen=True)
class Traffic:
    """Of one block and pass."""

    bytes: float  # a token
    operations: int


@dataclass(frozen=True)
class BlockTraffic:
    """Of one block, pass by pass."""

    forward: Traffic
    backward: Traffic


@cache
def block_traffic(part: Vit | Text, precision: str, compiled_for: str | None) -> BlockTraffic:
    """Of a block of trunk, decoder or text tower, with fused attention; compiled for "cpu" or "cuda", or eager."""
    if compiled_for is not None:
        size, fused = DTYPES[precision].itemsize, FUSED[compiled_for][type(part)]
        return BlockTraffic(*(Traffic(each.elements(part.width, _hidden(part)) * size, each.kernels) for each in fused))
    tokens = SEGMENTS * LENGTH
    return BlockTraffic(*(Traffic(each.bytes / tokens, each.operations) for each in _count(part, DTYPES[precision])))


@cache
def kept_bytes(part: Vit | Text, precision: str, is_compiled: bool) -> float:
    """That one block keeps of a token for its backward, without checkpointing; parameters are not in it."""
    if is_compiled:
        width, hidden = FUSED_KEEPS[type(part)]
        return (width * part.width + hidden * _hidden(part)) * DTYPES[precision].itemsize
    with _default_dtype(DTYPES[precision]), FakeTensorMode():
        run, x_TD, parameters = _block(part)
        kept: dict[int, Tensor] = {}  # holding them keeps their storages' numbers theirs
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(_storage(x), x), lambda x: x):
            run(x_TD)
        sizes = (x.untyped_storage().nbytes() for number, x in kept.items() if number not in map(_storage, parameters))
        return sum(sizes) / len(x_TD)


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _hidden(part: Vit | Text) -> int:
    is_vit = isinstance(part, Vit)
    return swiglu_hidden(part.width, part.mlp_ratio) if is_vit else int(part.width * part.mlp_ratio)


@dataclass
class Moved:
    """What a stretch of operations moved."""

    bytes: float = 0
    operations: int = 0


class Counting(TorchDispatchMode):
    """Adds up every operation that is not a view; `moved` may be changed for another while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = Moved()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        work = work_of(operator, args, kwargs or {}, result)
        self.moved.bytes += work.bytes - work.product_bytes
        self.moved.operations += work.bytes > 0
        return result


def _count(part: Vit | Text, dtype: torch.dtype) -> tuple[Moved, Moved]:
    """Forward and backward of SEGMENTS segments."""
    with _default_dtype(dtype), FakeTensorMode(), Counting() as counting:
        run, x_TD, _ = _block(part)
        counting.moved = forward = Moved()
        y_TD = run(x_TD)
        counting.moved = Moved()
        seed_TD = torch.ones_like(y_TD)
        counting.moved = backward = Moved()
        y_TD.backward(seed_TD)
    return forward, backward


def _block(part: Vit | Text, backend: str = "sdpa") -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """A block's forward, its input, and what is held without it: its parameters, and RoPE or the spans."""
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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
