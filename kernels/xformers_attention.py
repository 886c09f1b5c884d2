"""xFormers' block-diagonal attention as a custom operator for torch.compile; the one door to xFormers.

xFormers chooses its kernel in Python, from lengths that must be numbers, and torch.compile cannot trace that. So
forward and backward are custom operators, each with a shape function for tracing.

    attend_xformers(q_THE, k_THE, v_THE, lengths=[5, 5, 2, 2, 2])      # (T, H, E); lengths sum to T
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def attend_xformers(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: list[int], causal: bool = False) -> Tensor:
    """Attention within segments of `lengths`, which cover all T tokens: (T, H, E) -> (T, H, E), half precision."""
    out_THE: Tensor = _xformers(q_THE, k_THE, v_THE, lengths, causal)[0]
    return out_THE


@torch.library.custom_op("vtp_engine::xformers_attention", mutates_args=())
def _xformers(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: list[int], causal: bool) -> tuple[Tensor, Tensor]:
    """Attention within segments of `lengths`, and its log-sum-exp (H, T)."""
    from xformers.ops import fmha

    q, k, v = (t.unsqueeze(0).contiguous() for t in (q_THE, k_THE, v_THE))
    mask = _block_diagonal(tuple(lengths), causal, q_THE.device)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask, op=fmha.flash.FwOp)
    return out.squeeze(0), lse.squeeze(0)


@_xformers.register_fake
def _(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: list[int], causal: bool) -> tuple[Tensor, Tensor]:
    tokens, heads, _width = q_THE.shape
    return torch.empty_like(q_THE, memory_format=torch.contiguous_format), q_THE.new_empty(
        heads, tokens, dtype=torch.float32
    )


@torch.library.custom_op("vtp_engine::xformers_attention_backward", mutates_args=())
def _xformers_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import fmha

    grad, out, q, k, v = (t.unsqueeze(0).contiguous() for t in (grad, out, q, k, v))
    mask = _block_diagonal(tuple(lengths), causal, q.device)
    op = fmha.flash.BwOp
    grads = fmha.memory_efficient_attention_backward(grad, out, lse.unsqueeze(0), q, k, v, mask, op=op)
    return tuple(g.squeeze(0).clone() for g in grads)  # clones: the three may be views of one tensor


@_xformers_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.causal = inputs
    ctx.save_for_backward(*output, q, k, v)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_xformers_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.causal), None, None


_xformers.register_autograd(_backward, setup_context=_save_for_backward)


@lru_cache(maxsize=16)
def _block_diagonal(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths), device=device)
    return mask.make_causal() if causal else mask
