"""Attention as dense batches: one call for all segments of a length, with torch's own kernels.

    sdpa      torch's fused kernel
    matmul    two batched products and a softmax: in bf16 on CPU the faster one

`reference` is the oracle of every backend, these and the libraries' behind kernels/attention.py.

    attend_dense(q_THE, k_THE, v_THE, ((2, 5), (3, 2)), causal=False, kernel=DENSE["sdpa"], spans=None)   # (16, H, E)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = tuple[tuple[int, int], ...]  # (count, length) pairs in the order of the tokens
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Spans(NamedTuple):
    """Rows of C slots divided into spans of tokens that see each other; what is in no caption is a span too."""

    ids_RC: Tensor  # int32: slots of one row with equal ids are one span
    offsets: Tensor  # (N + 1,) int32: where each span begins in the flattened rows (a span may be empty), then R * C


def attend_dense(
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
