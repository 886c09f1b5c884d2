"""Stand-ins for the varlen kernels, computing on the CPU what those compute on a GPU.

torch's own code above its flash operators runs as installed: varlen_attn, its operators and their shapes for
torch.compile, autograd, and the registry that activates and restores a kernel. flash-attn and xFormers are modules with
the signatures of flash-attn 2.8.3 and xFormers 0.0.35.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import _registry, current_flash_attention_impl, restore_flash_attention_impl

from kernels import xformers_attention
from kernels.attention import Spans, attend_reference


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
        return attend_reference(q, k, v, ((1, q.shape[0]),), is_causal, Spans(offsets, offsets)), lse, none, none, none

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


def _by_offsets(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    assert offsets.dtype == torch.int32
    return attend_reference(q, k, v, ((1, q.shape[0]),), causal, Spans(offsets, offsets))


def _flash_attn() -> dict[str, ModuleType]:
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        return _by_offsets(q, k, v, cu_seqlens_q, causal)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn": module}


def _xformers() -> dict[str, ModuleType]:
    class BlockDiagonalMask:
        def __init__(self, lengths: list[int], causal: bool) -> None:
            self.offsets = torch.tensor([0, *lengths]).cumsum(0).int()
            self.causal = causal
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], *, device: torch.device | None = None) -> BlockDiagonalMask:
            return cls(q_seqlen, False)

        def make_causal(self) -> BlockDiagonalMask:
            return BlockDiagonalMask(self.lengths, True)

    def forward(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, *, op: Any) -> tuple[Tensor, Tensor]:
        assert query.shape[0] == 1
        out = _by_offsets(query[0], key[0], value[0], attn_bias.offsets, attn_bias.causal)
        return out[None], torch.zeros(1, query.shape[2], query.shape[1])

    def backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, *, op: Any
    ) -> tuple[Tensor, ...]:
        assert output.shape == grad.shape
        assert lse.shape == (1, query.shape[2], query.shape[1])
        grads = gradients_by_hand(grad[0], query[0], key[0], value[0], attn_bias.offsets, attn_bias.causal)
        return tuple(t[None] for t in grads)

    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    fmha: Any = modules["xformers.ops.fmha"]
    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    fmha.flash = SimpleNamespace(FwOp=object, BwOp=object)
    modules["xformers.ops"].fmha = fmha  # type: ignore[attr-defined]
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    return modules


@contextmanager
def flash_stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All varlen kernels on the CPU; gives the list of the calls that torch's own and FlashAttention 3 get."""
    calls: list[str] = []
    for name, module in (_flash_attn() | _xformers()).items():
        monkeypatch.setitem(sys.modules, name, module)
    xformers_attention._block_diagonal.cache_clear()
    own = Kernel("torch", calls)
    register: Callable[[], Kernel] = lambda: Kernel("FA3", calls)  # noqa: E731
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    try:
        yield calls
    finally:
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        own.remove()
