"""What blocks move and keep beside their products: counted, and in generated code."""

from __future__ import annotations

import pytest

from configs.model import Text, Vit
from engine.zero import DTYPES
from model import block
from profiling.benches.block_kernels import Target, generated
from profiling.cost import block_traffic
from profiling.cost.block_traffic import elementwise_traffic, kept_bytes, traced_block
from profiling.cost.operator_trace import OperatorTrace, default_dtype

pytestmark = pytest.mark.L0

VIT, TEXT = Vit(width=128, depth=1, heads=2), Text(width=128, depth=1, heads=2)


@pytest.mark.parametrize("part", [VIT, VIT.model_copy(update={"norm": "layernorm"}), TEXT], ids=["vit", "norm", "text"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_counted_without_memory_is_what_real_tensors_move(part: Vit | Text, precision: str) -> None:
    trace = OperatorTrace(with_traffic=True)
    with default_dtype(DTYPES[precision]):
        run, x_TD, _ = traced_block(part)
        with trace.phase("forward"):
            y_TD = run(x_TD)
    moved, operations = elementwise_traffic(trace, "forward")
    expected = block_traffic.block_traffic(part, precision, None).forward
    assert (moved / len(y_TD), operations) == (expected.bytes, expected.operations)


def test_a_token_of_twice_the_width_moves_and_keeps_twice_as_much() -> None:
    twice = VIT.model_copy(update={"width": 256, "heads": 4})
    for compiled_for in (None, "cpu", "cuda"):
        narrow, wide = (block_traffic.block_traffic(vit, "bf16", compiled_for).backward.bytes for vit in (VIT, twice))
        assert wide == pytest.approx(2 * narrow, rel=0.02)  # the hidden width is aligned to 8; norms' weights show
        narrow, wide = (kept_bytes(vit, "bf16", compiled_for is not None) for vit in (VIT, twice))
        assert wide == pytest.approx(2 * narrow, rel=0.02)


@pytest.mark.L2
@pytest.mark.parametrize(("device", "target"), [("cpu", "cpu"), ("cuda", "sm_90")])
@pytest.mark.parametrize("part", [Vit(width=1024, depth=1, heads=16), Text(width=768, depth=1, heads=12)])
def test_what_fused_blocks_move_and_keep_is_what_generated_code_does(
    part: Vit | Text, device: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_traffic, "SEGMENTS", 256)  # fewer tokens, and Inductor would not fuse sums over them
    monkeypatch.setattr(block, "uses_custom_backward", lambda _: device == "cuda")
    found = generated(lambda: traced_block(part, block_traffic.BACKENDS[device])[:2], target)
    tokens, predicted = 256 * block_traffic.LENGTH, block_traffic.block_traffic(part, "bf16", device)
    for each, expected in ((found.forward, predicted.forward), (found.backward, predicted.backward)):
        assert each.elementwise_bytes / tokens == pytest.approx(expected.bytes, rel=0.01)
        assert sum(not kernel.is_library for kernel in each.kernels) == expected.operations
    assert found.kept_bytes / tokens == pytest.approx(kept_bytes(part, "bf16", True), rel=0.02)
