"""Attention over a packed sequence: tokens see their own segment only.

A packed sequence has no padding inside segments and few distinct segment lengths, so attention over it is one
dense batched call per length: exact on every device, with no mask and no wasted product. This file is the
only door to attention libraries; a backend is a name in `_KERNELS` and a rule in `resolve`.

    T = 2*5 + 3*2 + 2 = 18 tokens: two segments of 5, three of 2, two of padding
    attend(q_THE, k_THE, v_THE, segments=((2, 5), (3, 2)))      # (18, H, E); the last 2 rows are zeros
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = tuple[tuple[int, int], ...]  # (count, length) pairs in the order of the tokens


@dataclass(frozen=True)
class Backend:
    """A resolved choice: what runs, and why it was chosen."""

    name: str
    reason: str


def resolve(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """The backend that `name` means for `dtype` on `device`; "auto" picks, a name is taken as it is.

    Raises ValueError for a name that is no backend.
    """
    if name == "auto":
        if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
            return Backend("matmul", "auto: bf16 on CPU, two batched products take a half to a fifth of sdpa")
        return Backend("sdpa", "auto: torch's fused attention, one call per segment length")
    if name not in _KERNELS:
        raise ValueError(f"attention backend {name!r} is not known; choose auto, {' or '.join(_KERNELS)}")
    return Backend(name, "named in the config")


def attend(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool = False,
    backend: str = "sdpa",
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment: (T, H, E) -> (T, H, E).

    `segments` lists (count, length) pairs; they cover the leading tokens, what follows is padding and comes
    out as zeros. With `causal` a token sees itself and the tokens before it in its segment.
    """
    kernel, done, parts = _KERNELS[backend], 0, []
    for count, length in segments:
        q_SHNE, k_SHNE, v_SHNE = (
            t[done : done + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (q_THE, k_THE, v_THE)
        )
        parts.append(kernel(q_SHNE, k_SHNE, v_SHNE, causal).transpose(1, 2).flatten(0, 1))
        done += count * length
    assert done <= q_THE.shape[0], f"segments {segments} hold {done} tokens, the sequence {q_THE.shape[0]}"
    if done < q_THE.shape[0]:
        parts.append(torch.zeros_like(v_THE[done:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def reference(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments, causal: bool = False) -> Tensor:
    """The oracle: the same function, one segment and one head at a time, as the formula is written."""
    out_THE, start = torch.zeros_like(v_THE), 0
    for length in [length for count, length in segments for _ in range(count)]:
        rows = slice(start, start + length)
        for head in range(q_THE.shape[1]):
            scores_NN = q_THE[rows, head] @ k_THE[rows, head].T * q_THE.shape[2] ** -0.5
            if causal:
                scores_NN = scores_NN.masked_fill(_future(length, scores_NN.device), float("-inf"))
            out_THE[rows, head] = scores_NN.softmax(-1) @ v_THE[rows, head]
        start += length
    return out_THE


def _sdpa(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q_SHNE, k_SHNE, v_SHNE, is_causal=causal)


def _matmul(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, causal: bool) -> Tensor:
    scores_SHNN = (q_SHNE * q_SHNE.shape[-1] ** -0.5) @ k_SHNE.transpose(-2, -1)
    if causal:
        scores_SHNN = scores_SHNN.masked_fill(_future(q_SHNE.shape[-2], q_SHNE.device), float("-inf"))
    return scores_SHNN.softmax(-1) @ v_SHNE


def _future(length: int, device: torch.device) -> Tensor:
    """(length, length) bool: True where the column comes after the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {"sdpa": _sdpa, "matmul": _matmul}
