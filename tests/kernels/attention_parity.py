"""An attention backend against the oracle, in values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import Segments, Spans, attend, attend_reference

HEADS, HEAD_WIDTH = 3, 8


def random_qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (tokens, 3, 8), float32 leaves; the same for the same number of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, tokens, HEADS, HEAD_WIDTH, generator=generator).unbind()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def check(backend: str, segments: Segments, tokens: int, causal: bool, spans: Spans | None = None) -> None:
    """Asserts that `backend` gives the oracle's outputs and gradients."""
    qkv, oracle_qkv = random_qkv(tokens), random_qkv(tokens)
    out, expected = (
        attend(*qkv, segments, causal, backend, spans),
        attend_reference(*oracle_qkv, segments, causal, spans),
    )
    # Measured worst 5e-7 of 4; one wrong key in a softmax of 9 is off by more than 0.01.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), qkv),
        torch.autograd.grad((expected * weights).sum(), oracle_qkv),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
