"""Attention over a packed sequence: tokens see their own segment only.

A packed sequence has no padding inside segments and few distinct segment lengths. Two families of kernels serve it:

- dense: one batched call per segment length, `sdpa` (torch's fused kernel) or `matmul` (two batched products);
- varlen: one call for all, that reads where segments begin (kernels/varlen.py: FlashAttention 2 and 3, torch's own,
  xFormers).

All are exact. Rows of equal length may be divided further into spans, as packed captions are.

    T = 2*5 + 3*2 + 2 = 18 tokens: two segments of 5, three of 2, two of padding
    attend(q_THE, k_THE, v_THE, segments=((2, 5), (3, 2)))      # (18, H, E); the last 2 rows are zeros
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import varlen

Segments = tuple[tuple[int, int], ...]  # (count, length) pairs in the order of the tokens


class Spans(NamedTuple):
    """Rows of C slots divided into spans of tokens that see each other; what is in no caption is a span too."""

    ids_RC: Tensor  # int32: slots of one row with equal ids are one span
    offsets: Tensor  # (N + 1,) int32: where each span begins in the flattened rows (a span may be empty), then R * C


@dataclass(frozen=True)
class Backend:
    """A resolved choice: what runs, and why it was chosen."""

    name: str
    reason: str


def resolve(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """The backend that `name` means for `dtype` on `device`; "auto" picks by rule, a name is held to its needs.

    Raises ValueError for a name that is no backend or cannot run here: what it needs and how to get it.
    """
    device = torch.device(device)
    if name == "auto":
        return _pick(device, dtype)
    if name not in (*DENSE, *varlen.NEEDS):
        raise ValueError(
            f"attention backend {name!r} is not known; choose one of auto, {', '.join((*DENSE, *varlen.NEEDS))}"
        )
    missing = varlen.missing(name, device, dtype) if name in varlen.NEEDS else None
    if missing:
        raise ValueError(f"it cannot run here: {missing}; or choose auto")
    varlen.activate(name)
    return Backend(name, "named in the config")


def _pick(device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return Backend("matmul", "auto: bf16 on CPU, two batched products take a half to a fifth of sdpa")
    if device.type == "cpu" or dtype == torch.float32:
        return Backend("sdpa", f"auto: torch's fused attention, one call per segment length, serves {dtype} best")
    reasons: list[str] = []
    for name in varlen.PREFERENCE:
        missing = varlen.missing(name, device, dtype)
        if not missing:
            varlen.activate(name)
            return Backend(name, "auto: one call for all segments" + "".join(f"; {why}" for why in reasons))
        reasons.append(f"not {name}: {missing}")
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
    if backend in varlen.NEEDS and (spans is None or backend in varlen.TAKES_OFFSETS):
        offsets = None if spans is None else spans.offsets
        out_THE = varlen.attend(q_THE[:held], k_THE[:held], v_THE[:held], segments, offsets, causal, backend)
    else:
        out_THE = _dense(q_THE, k_THE, v_THE, segments, causal, DENSE.get(backend, _sdpa), spans)
    return F.pad(out_THE, (0, 0, 0, 0, 0, q_THE.shape[0] - held)) if held < q_THE.shape[0] else out_THE


def reference(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments, causal: bool = False, spans: Spans | None = None
) -> Tensor:
    """The oracle: the same function, one segment and one head at a time, as the formula is written."""
    out_THE, start = torch.zeros_like(v_THE), 0
    lengths = [length for count, length in segments for _ in range(count)]
    for length in lengths if spans is None else spans.offsets.diff().tolist():
        rows = slice(start, start + length)
        for head in range(q_THE.shape[1]):
            scores_NN = q_THE[rows, head] @ k_THE[rows, head].T * q_THE.shape[2] ** -0.5
            if causal:
                scores_NN = scores_NN.masked_fill(_future(length, scores_NN.device), float("-inf"))
            out_THE[rows, head] = scores_NN.softmax(-1) @ v_THE[rows, head]
        start += length
    return out_THE


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _dense(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool,
    kernel: Kernel,
    spans: Spans | None,
) -> Tensor:
    """One call of `kernel` per segment length; (held, H, E)."""
    done, parts = 0, []
    for count, length in segments:
        q_SHNE, k_SHNE, v_SHNE = (
            t[done : done + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (q_THE, k_THE, v_THE)
        )
        visible = _visible(length, causal, spans, q_THE.device)
        parts.append(kernel(q_SHNE, k_SHNE, v_SHNE, visible).transpose(1, 2).flatten(0, 1))
        done += count * length
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _visible(length: int, causal: bool, spans: Spans | None, device: torch.device) -> Tensor | None:
    """Bool, broadcast to (S, H, length, length): True where the row's token sees the column's; None: everywhere."""
    visible = ~_future(length, device) if causal else None
    if spans is None:
        return visible
    same = (spans.ids_RC[:, :, None] == spans.ids_RC[:, None, :]).unsqueeze(1)
    return same if visible is None else same & visible


def _sdpa(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, visible: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q_SHNE, k_SHNE, v_SHNE, attn_mask=visible)


def _matmul(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, visible: Tensor | None) -> Tensor:
    scores_SHNN = (q_SHNE * q_SHNE.shape[-1] ** -0.5) @ k_SHNE.transpose(-2, -1)
    if visible is not None:
        scores_SHNN = scores_SHNN.masked_fill(~visible, float("-inf"))
    return scores_SHNN.softmax(-1) @ v_SHNE


def _future(length: int, device: torch.device) -> Tensor:
    """(length, length) bool: True where the column comes after the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


DENSE: dict[str, Kernel] = {"sdpa": _sdpa, "matmul": _matmul}
