"""What blocks move and keep beside their products: counted, and as inductor counts it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import metrics

from configs.architecture import Text, Vit
from engine.zero import DTYPES
from profiling.step import elementwise
from profiling.step.elementwise import Counting, block_traffic, kept_bytes

pytestmark = pytest.mark.L0

VIT, TEXT = Vit(width=128, depth=1, heads=2), Text(width=128, depth=1, heads=2)


@pytest.mark.parametrize("part", [VIT, VIT.model_copy(update={"norm": "layernorm"}), TEXT], ids=["vit", "norm", "text"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_counted_without_memory_is_what_real_tensors_move(part: Vit | Text, precision: str) -> None:
    with elementwise._default_dtype(DTYPES[precision]):
        run, x_TD, _ = elementwise._block(part)
        with Counting() as counting:
            y_TD = run(x_TD)
    assert counting.moved.bytes / len(y_TD) == block_traffic(part, precision, False).forward.bytes


def test_a_token_of_twice_the_width_moves_and_keeps_twice_as_much() -> None:
    twice = VIT.model_copy(update={"width": 256, "heads": 4})
    for is_compiled in (False, True):
        narrow, wide = (block_traffic(vit, "bf16", is_compiled).backward.bytes for vit in (VIT, twice))
        assert wide == pytest.approx(2 * narrow, rel=0.02)  # the hidden width is aligned to 8; norms' weights show
        narrow, wide = (kept_bytes(vit, "bf16", is_compiled) for vit in (VIT, twice))
        assert wide == pytest.approx(2 * narrow, rel=0.02)


@pytest.mark.L2
@pytest.mark.parametrize("part", [VIT, TEXT], ids=["vit", "text"])
def test_what_fused_blocks_move_and_keep_is_what_inductor_says(part: Vit | Text) -> None:
    """Its count has the operands of products and of attention in it, which are known, and each weight."""
    with elementwise._default_dtype(torch.bfloat16):
        run, x_TD, held = elementwise._block(part)
    weights = sum(p.numel() for p in held if p.requires_grad)
    for tensor in held:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    kept: dict[int, torch.Tensor] = {}
    with counted_by_inductor(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that caches are off
        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(storage(x), x), lambda x: x):
            y_TD = compiled(x_TD)
        forward = metrics.num_bytes_accessed
        y_TD.sum().backward()
        backward = metrics.num_bytes_accessed - forward
    width, hidden = part.width, elementwise._hidden(part)
    products = 8 * width + 3 * hidden if isinstance(part, Vit) else 8 * width + 2 * hidden
    attention = 4 * width
    for found, times, predicted in (
        (forward, 1, block_traffic(part, "bf16", True).forward),
        (backward, 2, block_traffic(part, "bf16", True).backward),
    ):
        own = (found - 2 * times * weights) / len(x_TD) - 2 * times * (products + attention)
        assert own == pytest.approx(predicted.bytes, rel=0.06)  # worst seen 5 %: the text tower's masks
    known = set(map(storage, held))
    sizes = sum(x.untyped_storage().nbytes() for number, x in kept.items() if number not in known)
    assert sizes / len(x_TD) == pytest.approx(kept_bytes(part, "bf16", True), rel=0.02)


@contextmanager
def counted_by_inductor() -> Iterator[None]:
    """Its metrics are kept while its logger listens, and only of what it really compiles."""
    logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    before = logger.level
    logger.setLevel(logging.INFO)
    metrics.reset()
    torch._dynamo.reset()
    try:
        with inductor.patch(force_disable_caches=True):
            yield
    finally:
        logger.setLevel(before)
        torch._dynamo.reset()


def storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)
