"""Every attention backend against the oracle that loops over segments and heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import DENSE_KERNELS, Segments, Spans, attend, attend_reference, resolve_attention
from tests.kernels.attention_parity import check, random_qkv

pytestmark = pytest.mark.L0
BACKENDS = list(DENSE_KERNELS)
layouts = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3).map(tuple)


def _tokens(segments: Segments) -> int:
    return sum(count * length for count, length in segments)


@pytest.mark.parametrize("backend", BACKENDS)
@given(segments=layouts, pad=st.integers(0, 5), causal=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_backends_equal_the_oracle_in_values_and_gradients(
    backend: str, segments: Segments, pad: int, causal: bool
) -> None:
    check(backend, segments, _tokens(segments) + pad, causal)


def spans_of(rows: list[list[int]], width: int) -> Spans:
    """Rows of spans of the given lengths; what is left of a row is one more."""
    ids, starts = torch.zeros(len(rows), width, dtype=torch.int32), []
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            ids[row, begin : begin + length] = number
            starts.append(row * width + begin)
            begin += length
        starts.append(row * width + begin)
    return Spans(ids, torch.tensor([*starts, len(rows) * width], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_spans_divide_rows_as_the_oracle_does(backend: str, causal: bool) -> None:
    check(backend, ((3, 9),), 27, causal, spans_of([[3, 2, 4], [9], [1, 1]], width=9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_comes_out_as_zeros(backend: str) -> None:
    out = attend(*random_qkv(16), segments=((2, 5), (1, 3)), backend=backend)
    assert out[:13].abs().min() > 0
    assert torch.equal(out[13:], torch.zeros_like(out[13:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_see_other_segments_nor_causally_its_future(backend: str) -> None:
    segments = ((2, 4), (2, 3))
    q, k, v = (t.detach() for t in random_qkv(14))
    before = attend(q, k, v, segments, causal=True, backend=backend)
    k[6], v[6] = 9.0, 9.0  # third token of the second segment
    after = attend(q, k, v, segments, causal=True, backend=backend)
    changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [6, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_stays_close_to_float32(backend: str) -> None:
    q, k, v = (t.detach() for t in random_qkv(2 * 33))
    expected = attend_reference(q, k, v, ((2, 33),))
    out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), ((2, 33),), backend=backend)
    assert out.dtype == torch.bfloat16
    # Measured worst 0.010: four bf16 roundings of numbers of order 1, each 0.004.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)


def test_auto_takes_the_dense_kernel_that_suits_the_cpu_and_says_why() -> None:
    for dtype, name in ((torch.bfloat16, "matmul"), (torch.float32, "sdpa")):
        backend = resolve_attention("auto", "cpu", dtype)
        assert backend.name == name
        assert backend.reason.startswith("auto: ")
    assert resolve_attention("matmul", "cpu").reason == "named in the config"


def test_an_unknown_backend_is_refused_by_name() -> None:
    known = "choose one of auto, sdpa, matmul, flash3, varlen, flash2, xformers"
    with pytest.raises(ValueError, match=f"'fast' is not known; {known}"):
        resolve_attention("fast", "cpu")
