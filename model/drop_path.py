"""Stochastic depth by segments: a residual branch runs on a random subset of the crops, the others pass by it.

    y = x + count / kept * branch(x)     for the kept segments of a run of `count` equally long ones
    y = x                                for the others                   DINOv2 (arXiv 2304.07193), section 5

The expectation over subsets is the full branch for the mean of a run, and what is dropped is never computed. How many
segments stay is constant, hence so are all shapes: which ones they are enters as a tensor of indices, drawn outside.

    segments ((17, 257), (32, 37)) at rate 0.3: 12 of 17 segments and 22 of 32 stay
    kept = subset(segments, 0.3)
    kept.segments, kept.pad              ((12, 257), (22, 37)), 14: a branch sees 3898 tokens and 14 of padding
    token_idx_L2K = kept.tokens(segment_idx, segments)              # (depth, 2, 34) segments -> (depth, 2, 3912) tokens
    x_TD = kept.add_back(x_TD, branch(x_TD.index_select(0, token_idx_K)), token_idx_K)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dense_attention import Segments
from model.pack import ALIGN


@dataclass(frozen=True)
class Subset:
    """What a branch sees: numbers that are constant within a run."""

    segments: Segments  # (kept, length) pairs, in the order of the whole sequence's
    scales: tuple[float, ...]  # count / kept of each pair
    pad: int  # rows behind them, so that products see a multiple of 16

    @property
    def used(self) -> int:
        """Tokens of the kept segments; the padding is not counted."""
        return sum(kept * length for kept, length in self.segments)

    def tokens(self, segment_idx: Tensor, segments: Segments) -> Tensor:
        """Which tokens the kept segments are: (..., kept segments) int64 -> (..., K) int64, padding included.

        `segment_idx` counts from 0 in every pair of `segments`, those of the whole sequence. Padding names token 0.
        """
        starts, parts = 0, []
        chosen = segment_idx.split([kept for kept, _ in self.segments], dim=-1)
        for idx, (count, length) in zip(chosen, segments, strict=True):
            offsets = torch.arange(length, device=idx.device)
            parts.append((starts + idx.unsqueeze(-1) * length + offsets).flatten(-2))
            starts += count * length
        return torch.cat((*parts, parts[0].new_zeros(*parts[0].shape[:-1], self.pad)), dim=-1)

    def add_back(self, x_TD: Tensor, y_KD: Tensor, token_idx_K: Tensor) -> Tensor:
        """x with the scaled branch y added at its tokens: (T, D), (K, D), (K,) -> (T, D). What y has in its padding is
        dropped, and learns nothing."""
        pieces = y_KD[: self.used].split([kept * length for kept, length in self.segments])
        # By a Python number: rounded to bf16 first, the scale itself would be off by up to 0.2 %.
        scaled = [piece * scale for piece, scale in zip(pieces, self.scales, strict=True)]
        return x_TD.index_add(0, token_idx_K[: self.used], torch.cat(scaled) if len(scaled) > 1 else scaled[0])


def subset(segments: Segments, rate: float) -> Subset:
    """round((1 - rate) * count) segments of every (count, length) pair, at least one."""
    kept = tuple((max(1, round((1 - rate) * count)), length) for count, length in segments)
    scales = tuple(count / stays for (count, _), (stays, _) in zip(segments, kept, strict=True))
    return Subset(kept, scales, pad=-sum(count * length for count, length in kept) % ALIGN)
