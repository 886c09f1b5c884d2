"""Masks for iBOT: block-wise patches of the global crops that are hidden from the student, with exact counts.

Step t has 2s crops of each canonical stream (s = batch.ssl / C rows, two global crops each); a fixed number of
them is masked, at ratios spread evenly over masks.ratio. A stream's total is the same in every step, hence so
is a rank's, for every world size that divides C: shapes stay static and a sample's mask does not depend on
the world size.

With 8 crops of 4 x 4 patches, share_of_crops=0.5 and ratio=(0.1, 0.5): 4 crops have about 2, 4, 6 and 7 masked
patches.

Blocks are rectangles of aspect 0.3 .. 1/0.3 (BEiT, DINOv2); the rest of a count is filled patch by patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs import Config
from configs.data import Masks
from data.hashing import hash_words, permutation, uniform

Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
_CROPS, _SPREAD, _BLOCKS, _FILL = 1, 2, 3, 4  # purposes of hashes
_ROUNDS = 16  # rectangles proposed per crop
_MIN_BLOCK = 4  # patches
_MIN_ASPECT = 0.3


@dataclass(frozen=True)
class MaskSampler:
    """Generates the masks of a run.

    `grid` is the side of a global crop in patches, `rows` the ssl rows of all ranks.
    """

    config: Masks
    seed: int
    grid: int
    rows: int
    streams: int

    def masks(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Flags, Ints]:
        """Return (2S, P) masks of the rank's S ssl rows, view-major, and (M,) flat indices of True in them."""
        patches = self.grid * self.grid
        local = np.arange(self.rows // world_size)
        positions = local * world_size + rank  # row i of rank r is the step's position i * W + r
        masks = np.zeros((2, len(local), patches), bool)
        for stream in range(rank, self.streams, world_size):
            masks[:, positions % self.streams == stream] = self._stream_masks(step, stream)
        flat = masks.reshape(-1, patches)
        return flat, np.flatnonzero(flat)

    def _stream_masks(self, step: int, stream: int) -> Flags:
        """Return (2, s, P): the masks of one stream's rows in one step."""
        crops = 2 * self.rows // self.streams
        counts = self._counts(step, stream, crops)
        chosen = np.flatnonzero(counts)
        masks = np.zeros((crops, self.grid * self.grid), bool)
        words = hash_words(self.seed, _BLOCKS, step, stream, chosen)
        masks[chosen] = fill_to_counts(draw_blocks(words, counts[chosen], self.grid), counts[chosen], words)
        return masks.reshape(2, -1, masks.shape[1])

    def _counts(self, step: int, stream: int, crops: int) -> Ints:
        """Return the number of masked patches of each crop.

        One count per ratio bin, shifted inside the bin in opposite pairs: the total is constant.
        """
        bins, width = _ratio_bins(self.config, crops, self.grid)
        num_masked = len(bins)
        pairs = np.arange(num_masked // 2)
        moves = ((uniform(hash_words(self.seed, _SPREAD, step, stream, pairs)) - 0.5) * width).astype(np.int64)
        bins[pairs] += moves
        bins[num_masked - 1 - pairs] -= moves
        counts = np.zeros(crops, np.int64)
        counts[:num_masked] = bins
        return counts[permutation(crops, self.seed, _CROPS, step, stream)]


def num_masked_patches(config: Config, rows: int) -> int:
    """Return M, the number of masked patches of a rank with `rows` ssl rows: the same in every step."""
    if not rows:
        return 0
    grid = config.views.global_size // config.model.patch_size
    streams, ranks = config.data.streams, config.batch.ssl // rows
    bins, _ = _ratio_bins(config.masks, 2 * config.batch.ssl // streams, grid)
    return int(bins.sum()) * streams // ranks


def _ratio_bins(masks: Masks, crops: int, grid: int) -> tuple[Ints, float]:
    """Return the masked patches of each masked crop of a stream, in the middles of ratio bins; and a bin's width."""
    num_masked = math.floor(masks.share_of_crops * crops + 0.5)
    low, high = masks.ratio
    width = (high - low) / max(num_masked, 1) * grid * grid
    middles = low * grid * grid + width * (np.arange(num_masked) + 0.5)
    return np.floor(middles + 0.5).astype(np.int64), width


def draw_blocks(words: NDArray[np.uint64], counts: Ints, grid: int) -> Flags:
    """Draw (n, P) unions of rectangles with at most counts[i] patches each."""
    masks = np.zeros((len(words), grid, grid), bool)
    line = np.arange(grid)
    for round_idx in range(_ROUNDS):
        area_u, aspect_u, top_u, left_u = uniform(hash_words(words[None], np.arange(4)[:, None] + 4 * round_idx))
        remaining = counts - masks.sum((1, 2))
        area = _MIN_BLOCK + area_u * np.maximum(remaining - _MIN_BLOCK, 0)
        aspect = np.exp(np.log(_MIN_ASPECT) * (1 - 2 * aspect_u))
        tall = np.clip(np.rint(np.sqrt(area * aspect)), 1, grid)
        wide = np.clip(np.rint(np.sqrt(area / aspect)), 1, grid)
        top, left = np.floor(top_u * (grid - tall + 1)), np.floor(left_u * (grid - wide + 1))
        in_rows = (line >= top[:, None]) & (line < (top + tall)[:, None])
        in_columns = (line >= left[:, None]) & (line < (left + wide)[:, None])
        grown = masks | (in_rows[:, :, None] & in_columns[:, None, :])
        fits = grown.sum((1, 2)) <= counts
        masks = np.where(fits[:, None, None], grown, masks)
    return masks.reshape(len(words), grid * grid)


def fill_to_counts(masks: Flags, counts: Ints, words: NDArray[np.uint64]) -> Flags:
    """Mask further patches at random until row i has counts[i]."""
    scores = uniform(hash_words(words[:, None], _FILL, np.arange(masks.shape[1])[None, :])) - masks
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks < counts[:, None]
