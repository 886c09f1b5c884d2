"""Attention over a packed sequence: tokens see their own segment only.

A packed sequence has no padding inside segments and few distinct segment lengths. Two families of kernels serve it, all
exact. Dense ones take one batched call per segment length (kernels/dense_attention.py: sdpa, matmul). Varlen ones take
one call for all, told by offsets where each segment begins; this file is the one door to their libraries:

    flash3      FlashAttention 3 for Hopper (module flash_attn_interface), put under torch's varlen_attn by torch itself
    varlen      torch.nn.attention.varlen: the FlashAttention 2 inside PyTorch, nothing to install
    flash2      the flash-attn package, 2.7 or newer (its operators are known to torch.compile)
    xformers    BlockDiagonalMask; as an operator of our own, because torch.compile cannot look through its dispatcher

Rows of equal length may be divided further into spans, as packed captions are.

    T = 2*5 + 3*2 + 2 = 18 tokens: two segments of 5, three of 2, two of padding
    attend(q_THE, k_THE, v_THE, segments=((2, 5), (3, 2)))      # (18, H, E); the last 2 rows are zeros
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dense_attention import DENSE, Segments, Spans, attend_dense


@dataclass(frozen=True)
class Need:
    """What a backend needs beside a CUDA device and half precision."""

    module: str
    capability: tuple[int, int]
    remedy: str


NEEDS = {
    "flash3": Need("flash_attn_interface", (9, 0), "build the folder hopper/ of the flash-attention sources"),
    "varlen": Need("torch.nn.attention.varlen", (8, 0), "install torch 2.13 or newer"),
    "flash2": Need(
        "flash_attn", (8, 0), "pip install --no-build-isolation flash-attn (compiles for about half an hour)"
    ),
    "xformers": Need("xformers", (8, 0), "pip install --no-build-isolation --no-binary xformers xformers (compiles)"),
}
PREFERENCE = ("flash3", "varlen", "flash2", "xformers")  # what "auto" tries, best first
# Whose backward adds up in an order of its own each time, and cannot be told otherwise from here.
NOT_DETERMINISTIC = ("flash3", "xformers")
TAKES_OFFSETS = ("flash3", "varlen", "flash2")  # xFormers wants lengths as Python numbers, known before the call


@dataclass(frozen=True)
class Backend:
    """A resolved choice: what runs, and why it was chosen."""

    name: str
    reason: str


def resolve(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, is_deterministic: bool = False
) -> Backend:
    """The backend that `name` means for `dtype` on `device`; "auto" picks by rule, a name is held to its needs.

    With `is_deterministic` only those whose gradients are the same bits every time, under
    torch.use_deterministic_algorithms.

    Raises ValueError for a name that is no backend or cannot run here: what it needs and how to get it.
    """
    device = torch.device(device)
    if name == "auto":
        return _pick(device, dtype, NOT_DETERMINISTIC if is_deterministic else ())
    if name not in (*DENSE, *NEEDS):
        raise ValueError(f"attention backend {name!r} is not known; choose one of auto, {', '.join((*DENSE, *NEEDS))}")
    if is_deterministic and name in NOT_DETERMINISTIC:
        raise ValueError(
            "its backward is not deterministic, which the run is to be; choose auto, varlen, flash2 or sdpa"
        )
    obstacle = missing(name, device, dtype) if name in NEEDS else None
    if obstacle:
        raise ValueError(f"it cannot run here: {obstacle}; or choose auto")
    activate(name)
    return Backend(name, "named in the config")


def _pick(device: torch.device, dtype: torch.dtype, refused: tuple[str, ...]) -> Backend:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return Backend("matmul", "auto: bf16 on CPU, two batched products take a half to a fifth of sdpa")
    if device.type == "cpu" or dtype == torch.float32:
        return Backend("sdpa", f"auto: torch's fused attention, one call per segment length, serves {dtype} best")
    reasons: list[str] = []
    for name in PREFERENCE:
        obstacle = "its backward is not deterministic" if name in refused else missing(name, device, dtype)
        if not obstacle:
            activate(name)
            return Backend(name, "auto: one call for all segments" + "".join(f"; {why}" for why in reasons))
        reasons.append(f"not {name}: {obstacle}")
    return Backend("sdpa", "auto: one call per segment length; " + "; ".join(reasons))


def attend(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool = False,
    backend: str = "sdpa",
    spans: Spans | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment: (T, H, E) -> (T, H, E).

    `segments` lists (count, length) pairs; they cover the leading tokens, what follows is padding and comes
    out as zeros. With `causal` a token sees itself and the tokens before it in its segment. `spans` divides the
    rows of a single (count, length) pair further; then there is no padding.
    """
    held = sum(count * length for count, length in segments)
    assert held <= q_THE.shape[0], f"segments {segments} hold {held} tokens, the sequence {q_THE.shape[0]}"
    assert spans is None or len(segments) == 1, f"spans divide rows of one length, not {segments}"
    if backend in NEEDS and (spans is None or backend in TAKES_OFFSETS):
        offsets = None if spans is None else spans.offsets
        out_THE = _attend_varlen(q_THE[:held], k_THE[:held], v_THE[:held], segments, offsets, causal, backend)
    else:
        out_THE = attend_dense(q_THE, k_THE, v_THE, segments, causal, DENSE.get(backend, DENSE["sdpa"]), spans)
    return F.pad(out_THE, (0, 0, 0, 0, 0, q_THE.shape[0] - held)) if held < q_THE.shape[0] else out_THE


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve `dtype` on `device`, with the way out; None if it can."""
    need = NEEDS[name]
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it needs a CUDA device, this machine has none in use ({device.type})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in half precision, not {dtype}; set optim.precision=bf16"
    capability = torch.cuda.get_device_capability(device)
    if capability < need.capability:
        return f"it needs compute capability {_dotted(need.capability)}, this GPU has {_dotted(capability)}"
    if name == "flash3" and capability[0] != 9:
        return f"FlashAttention 3 is made for Hopper (9.0), this GPU has {_dotted(capability)}"
    return None if _is_installed(need.module) else f"{need.module} is not installed; {need.remedy}"


def activate(name: str) -> None:
    """Puts FlashAttention 3 under torch's varlen_attn, for the life of the process; other names need nothing."""
    if name == "flash3":
        importlib.import_module("torch.nn.attention").activate_flash_attention_impl("FA3")


def _attend_varlen(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    offsets: Tensor | None,
    causal: bool,
    backend: str,
) -> Tensor:
    """Attention within segments that cover all T tokens, or, given `offsets`, between neighbouring offsets."""
    if backend == "xformers":
        lengths = [length for count, length in segments for _ in range(count)]
        return _xformers(q_THE, k_THE, v_THE, lengths, causal)[0]
    offsets = begins(segments, q_THE.device) if offsets is None else offsets
    longest = max(length for _, length in segments)
    if backend == "flash2":
        from flash_attn import flash_attn_varlen_func

        is_fixed = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            q_THE, k_THE, v_THE, offsets, offsets, longest, longest, causal=causal, deterministic=is_fixed
        )
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    out_THE = varlen_attn(q_THE, k_THE, v_THE, offsets, offsets, longest, longest, window_size=window)
    assert isinstance(out_THE, Tensor), "it returns more only when asked"
    return out_THE


def begins(segments: Segments, device: torch.device) -> Tensor:
    """(N + 1,) int32: where each segment begins, then where the last ends. Made on the device, not copied there."""
    parts, done = [], 0
    for count, length in segments:
        parts.append(torch.arange(count, dtype=torch.int32, device=device) * length + done)
        done += count * length
    parts.append(torch.full((1,), done, dtype=torch.int32, device=device))
    return torch.cat(parts)


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.causal = inputs
    ctx.save_for_backward(*output, q, k, v)


def _differentiate(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_xformers_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.causal), None, None


_xformers.register_autograd(_differentiate, setup_context=_keep)


@lru_cache(maxsize=16)
def _block_diagonal(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths), device=device)
    return mask.make_causal() if causal else mask


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
