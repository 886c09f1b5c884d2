"""All crops of a step as one packed token sequence, whose layout is known before the first step.

One trunk pass over one sequence costs one parameter gather per block where separate passes per crop size cost one each.
Segments hold no padding, and the layout is plain integers that never change within a run: one compiled graph.

    crops = {"clip": (2, 32, 32), "ssl_global": (2, 32, 32), "ssl_local": (4, 16, 16)}
    layout = packed_layout(crops, patch_size=16, prefix=1)

    layout.groups    clip: 2 segments of 1 + 2*2 = 5 tokens, ssl_global: 2 of 5, ssl_local: 4 of 1 + 1*1 = 2
    layout.pad       4, because 2*5 + 2*5 + 4*2 = 28 and 32 is the next multiple of 16
    layout.segments  ((4, 5), (4, 2)): attention takes neighbours of equal length together
    layout.rows(x_TD, "ssl_local")     x_TD[20:28] as (4, 2, D)

A group may leave out patches, the same number in each crop: with `hidden={"clip": 3}` a clip segment has 1 + 1 tokens.

The file in order: batch sizes of one rank, the layout, and two ways to compute a branch for some tokens only: the
tokens that are read after the trunk (`TokenSubset`) and the segments that stochastic depth keeps (`KeptSegments`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import Config, UserError
from kernels.attention import Segments

ALIGN = 16  # tokens: the multiple that FP8 products and tensor cores want


@dataclass(frozen=True)
class RankBatchSizes:
    """One rank's images per step, and which of them each objective uses; a config's batch sizes are global.

    There are `clip` rows; ssl uses the leading `ssl` of them, rec `rec` rows from `rec_start` on. The clip rows pass in
    `micro_batches` equal parts; number `shared_micro_batch` of them also carries ssl and rec.

        RankBatchSizes.per_rank(config, world_size=2)     # clip 32, ssl 8, rec 8, rec_start 0
    """

    clip: int
    ssl: int
    rec: int
    rec_start: int
    micro_batches: int = 1

    @classmethod
    def per_rank(cls, config: Config, world_size: int) -> RankBatchSizes:
        """The batch sizes of one of `world_size` ranks. Raises UserError where the ranks do not divide the batch."""
        for key in ("clip", "ssl", "rec"):
            rows = getattr(config.batch, key)
            if rows % world_size:
                raise UserError(
                    f"batch.{key}={rows} is not a multiple of the {world_size} ranks: all ranks take equally "
                    f"many rows; change batch.{key} or the number of ranks"
                )
        clip, ssl, rec = (getattr(config.batch, key) // world_size for key in ("clip", "ssl", "rec"))
        parts = config.system.clip.micro_batches
        if clip % parts:
            raise UserError(
                f"system.clip.micro_batches={parts} does not divide a rank's {clip} rows (batch.clip="
                f"{config.batch.clip} on {world_size} ranks): parts are equal; change it or the number of ranks"
            )
        return cls(clip, ssl, rec, ssl if config.batch.layout == "disjoint" else 0, parts)

    @property
    def clip_per_micro_batch(self) -> int:
        """Clip rows of one micro-batch."""
        return self.clip // self.micro_batches

    @property
    def shared_micro_batch(self) -> int:
        """Index of the micro-batch that holds the rec rows."""
        return self.rec_start // self.clip_per_micro_batch if self.rec else 0


@dataclass(frozen=True)
class CropGroup:
    """Crops of one kind and size: `segments` crops of `length` tokens, first the prefix, then the patches of `grid`."""

    name: str
    segments: int
    length: int
    grid: tuple[int, int]  # patches down, patches across
    hidden: int = 0  # patches of each crop that are left out of the sequence

    @property
    def patches(self) -> int:
        """Patch tokens of each crop."""
        return self.grid[0] * self.grid[1] - self.hidden

    @property
    def prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return self.length - self.patches


@dataclass(frozen=True)
class PackedLayout:
    """Position of every crop in the packed sequence. Hashable and constant within a run."""

    groups: tuple[CropGroup, ...]
    pad: int

    @property
    def tokens(self) -> int:
        """T: length of the packed sequence, padding included."""
        return sum(group.segments * group.length for group in self.groups) + self.pad

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(count, length) pairs for attention, neighbouring groups of equal length merged."""
        runs = groupby(self.groups, key=lambda group: group.length)
        return tuple((sum(group.segments for group in run), length) for length, run in runs)

    def slice(self, name: str) -> slice:
        """The tokens of group `name`, as a slice of the packed sequence."""
        start = 0
        for group in self.groups:
            stop = start + group.segments * group.length
            if group.name == name:
                return slice(start, stop)
            start = stop
        raise KeyError(name)

    def rows(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, length, D): a view of group `name`, one row per crop."""
        group = self.group(name)
        return x_TD[self.slice(name)].unflatten(0, (group.segments, group.length))

    def cls(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, D): the CLS token of every crop of group `name`."""
        return self.rows(x_TD, name)[:, 0]

    def patches(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, P, D): the patches of every crop of group `name`, row by row, hidden ones left out."""
        return self.rows(x_TD, name)[:, self.group(name).prefix :]

    def group(self, name: str) -> CropGroup:
        """The group called `name`."""
        return next(group for group in self.groups if group.name == name)

    def has(self, name: str) -> bool:
        """Whether there is a group called `name`."""
        return any(group.name == name for group in self.groups)


def packed_layout(
    crops: Mapping[str, tuple[int, int, int]],
    patch_size: int,
    prefix: int,
    align: int = ALIGN,
    hidden: Mapping[str, int] | None = None,
) -> PackedLayout:
    """Lay out `crops`, name -> (count, height, width) with sizes in pixels, in the order given.

    `hidden` is the number of patches left out of each crop, by group. Padded to a multiple of `align` tokens. Raises
    UserError where a side is not a multiple of the patch size.
    """
    groups = []
    for name, (count, height, width) in crops.items():
        if height % patch_size or width % patch_size or not height or not width:
            raise UserError(
                f"{name} images of {height}x{width} pixels: sides must be multiples of the patch size "
                f"{patch_size}; resize or crop them"
            )
        grid, left_out = (height // patch_size, width // patch_size), (hidden or {}).get(name, 0)
        groups.append(CropGroup(name, count, prefix + grid[0] * grid[1] - left_out, grid, left_out))
    used = sum(group.segments * group.length for group in groups)
    return PackedLayout(tuple(groups), pad=-used % align)


class TokenSubset(NamedTuple):
    """The tokens that are read after the trunk: the last MLP computes no others.

    Attention lets every token of a crop act on every other, an MLP does not: after the last attention a patch that no
    objective reads changes nothing. Of the 14,704 tokens of a VTP-S step (32 clip, 8 ssl with 2 + 8 crops, 4 rec) 1,754
    are read: the CLS of every crop, the hidden patches of the ssl crops, the patches to reconstruct. Values and
    gradients of the tokens that are read are the same, exactly.

        read_tokens = token_subset([layout.cls(token_indices(layout, device), "clip"), ...])
        x_TD = trunk(crops, masks, read_tokens=read_tokens)         # other rows come out unfinished

    `idx_N` holds `used` distinct tokens, padded with token 0 to a multiple of 16, as FP8 products need.
    """

    idx_N: Tensor
    used: int

    def add(self, x_TD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x) for the tokens of the subset, x elsewhere: (T, D) -> (T, D)."""
        y_ND = branch(x_TD.index_select(0, self.idx_N))
        return x_TD.index_add(0, self.idx_N[: self.used], y_ND[: self.used])


def token_indices(layout: PackedLayout, device: torch.device) -> Tensor:
    """(T, 1): every token's index, to be selected from in the same way as its features."""
    return torch.arange(layout.tokens, device=device).unsqueeze(1)


def token_subset(parts: Sequence[Tensor]) -> TokenSubset:
    """Join the token indices in `parts`, (..., 1) each; no index may occur twice."""
    idx_N = torch.cat([part.flatten() for part in parts])
    return TokenSubset(F.pad(idx_N, (0, -len(idx_N) % ALIGN)), len(idx_N))


def masked_patches(x_TD: Tensor, layout: PackedLayout, masked_idx: Tensor) -> Tensor:
    """Select the masked patches (M, D): those of the global crops at flat positions `masked_idx` of (G, P)."""
    return layout.patches(x_TD, "ssl_global").flatten(0, 1).index_select(0, masked_idx)


@dataclass(frozen=True)
class KeptSegments:
    """Stochastic depth by segments: a residual branch runs on a random subset of the crops; others skip it.

        y = x + count / kept * branch(x)     for the kept segments among `count` segments of one length
        y = x                                for the others                   DINOv2 (arXiv 2304.07193), section 5

    The expectation over subsets is the full branch, and what is dropped is never computed. The number of kept segments
    is constant within a run, hence so are all shapes: which ones they are is an input, a tensor of indices.

        segments ((17, 257), (32, 37)) at rate 0.3: 12 of 17 segments and 22 of 32 are kept
        kept = kept_segments(segments, 0.3)
        kept.segments, kept.pad          ((12, 257), (22, 37)), 14: a branch sees 3898 tokens and 14 of padding
        token_idx_L2K = kept.tokens(segment_idx, segments)          # (depth, 2, 34) segments -> (depth, 2, 3912) tokens
        x_TD = kept.add_back(x_TD, branch(x_TD.index_select(0, token_idx_K)), token_idx_K)
    """

    segments: Segments  # (kept, length) pairs, in the order of the whole sequence's
    scales: tuple[float, ...]  # count / kept of each pair
    pad: int  # rows of padding, so that products see a multiple of 16

    @property
    def used(self) -> int:
        """Tokens of the kept segments; the padding is not counted."""
        return sum(kept * length for kept, length in self.segments)

    def tokens(self, segment_idx: Tensor, segments: Segments) -> Tensor:
        """Token indices of the kept segments: (..., kept segments) int64 -> (..., K) int64, padding included.

        `segment_idx` counts from 0 in every pair of `segments`, those of the whole sequence. Padding is token 0.
        """
        starts, parts = 0, []
        chosen = segment_idx.split([kept for kept, _ in self.segments], dim=-1)
        for idx, (count, length) in zip(chosen, segments, strict=True):
            offsets = torch.arange(length, device=idx.device)
            parts.append((starts + idx.unsqueeze(-1) * length + offsets).flatten(-2))
            starts += count * length
        return torch.cat((*parts, parts[0].new_zeros(*parts[0].shape[:-1], self.pad)), dim=-1)

    def add_back(self, x_TD: Tensor, y_KD: Tensor, token_idx_K: Tensor) -> Tensor:
        """Add the scaled branch y to x at its tokens: (T, D), (K, D), (K,) -> (T, D). Padding of y is dropped and gets
        no gradient."""
        pieces = y_KD[: self.used].split([kept * length for kept, length in self.segments])
        # By a Python number: rounded to bf16 first, the scale itself would be off by up to 0.2 %.
        scaled = [piece * scale for piece, scale in zip(pieces, self.scales, strict=True)]
        return x_TD.index_add(0, token_idx_K[: self.used], torch.cat(scaled) if len(scaled) > 1 else scaled[0])


def kept_segments(segments: Segments, rate: float) -> KeptSegments:
    """Keep round((1 - rate) * count) segments of every (count, length) pair, at least one."""
    kept = tuple((max(1, round((1 - rate) * count)), length) for count, length in segments)
    scales = tuple(count / num_kept for (count, _), (num_kept, _) in zip(segments, kept, strict=True))
    return KeptSegments(kept, scales, pad=-sum(count * length for count, length in kept) % ALIGN)
