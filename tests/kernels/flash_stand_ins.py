"""Stand-ins for the kernels under torch's flash operators, computing on the CPU what those compute on a GPU.

torch's own code above them runs as installed: varlen_attn, its operators and their shapes for torch.compile, autograd,
and the registry that activates and restores a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import _registry, current_flash_attention_impl, restore_flash_attention_impl

from kernels.dense_attention import Spans, reference


class Kernel:
    """A registered pair of operators; `remove` is what torch's registry calls to restore the kernel below."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls
        self.library: Library | None = Library("aten", "IMPL", "CPU")
        self.library.impl("_flash_attention_forward", self.forward, "CPU", allow_override=True)
        self.library.impl("_flash_attention_backward", self.backward, "CPU", allow_override=True)

    def remove(self) -> None:
        self.library = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, offsets_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, window_size_left: int, window_size_right: int,
        **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append(f"{self.name} forward")
        _assert_asked_rightly(offsets, max_q, max_k, dropout_p, is_causal, window_size_left, window_size_right)
        assert torch.equal(offsets, offsets_k)
        lse, none = q.new_zeros(q.shape[1], q.shape[0]), q.new_empty(0)
        return reference(q, k, v, ((1, q.shape[0]),), is_causal, Spans(offsets, offsets)), lse, none, none, none

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor,
        offsets_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng: Tensor, unused: Tensor, *,
        window_size_left: int, window_size_right: int, **others: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append(f"{self.name} backward")
        _assert_asked_rightly(offsets, max_q, max_k, dropout_p, is_causal, window_size_left, window_size_right)
        assert lse.shape == (q.shape[1], q.shape[0])
        return gradients_by_hand(grad, q, k, v, offsets, is_causal)


def _assert_asked_rightly(
    offsets: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, left: int, right: int
) -> None:
    assert offsets.dtype == torch.int32
    assert max_q == max_k >= int(offsets.diff().max())
    assert dropout_p == 0
    assert (left, right) == ((-1, 0) if is_causal else (-1, -1))


def gradients_by_hand(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v without autograd, which is off inside an operator."""
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(begin, end)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head].T * q.shape[2] ** -0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) if causal else torch.zeros_like(scores).bool()
            shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            dv[rows, head] = shares.T @ grad[rows, head]
            dshares = grad[rows, head] @ v[rows, head].T
            dscores = shares * (dshares - (dshares * shares).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
            dq[rows, head], dk[rows, head] = dscores @ k[rows, head], dscores.T @ q[rows, head]
    return dq, dk, dv


@contextmanager
def flash_stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch's own kernel and FlashAttention 3 on the CPU; gives the list of the calls that each gets."""
    calls: list[str] = []
    own = Kernel("torch", calls)
    register: Callable[[], Kernel] = lambda: Kernel("FA3", calls)  # noqa: E731
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    try:
        yield calls
    finally:
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        own.remove()
