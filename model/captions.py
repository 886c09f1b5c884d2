"""Captions packed into rows: the text tower computes what captions say, not the padding after them.

The tower is causal and reads a caption at its end-of-text token, so nothing after that token can reach the result:
dropping it is exact. What is left (some 20 of 77 tokens in web data) is laid into as few rows as it fits, several
captions a row, each with its own positions and blind to its neighbours.

    packed = pack_captions(captions_BC)        # 32 captions of 77 slots, 20 tokens each on average
    packed.tokens_RC.shape                     # (9, 80): 9 rows instead of 32
    tower(packed)                              # (32, E), as tower(one_a_row(captions_BC)) gives it

Shapes change little from step to step: rows are as wide as the context (aligned to 16) and their number climbs a ladder
of at most 8 rungs an octave, so that a run meets two or three shapes and compiled blocks as many graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.dense_attention import Spans

Ids = NDArray[np.int64]
ALIGN = 16  # slots: a row's width is a multiple, and so is the number of tokens of all rows


class PackedCaptions(NamedTuple):
    """B captions in R rows of C slots. Empty slots hold id 0 and belong to no caption."""

    tokens_RC: Tensor  # int64 ids
    positions_RC: Tensor  # int64: each token's place in its own caption
    spans: Spans  # which slots see each other
    ends_B: Tensor  # int64: where each caption's end-of-text lies in the flattened rows

    def saved(self, captions_BC: Tensor) -> float:
        """The share of the token slots of `captions_BC` that this has not; negative where it has more."""
        return 1 - self.tokens_RC.numel() / captions_BC.numel() if captions_BC.numel() else 0.0

    def to(self, device: torch.device) -> PackedCaptions:
        """The same on `device`."""
        tokens, positions, ends = (
            t.to(device, non_blocking=True) for t in (self.tokens_RC, self.positions_RC, self.ends_B)
        )
        return PackedCaptions(tokens, positions, Spans(*(t.to(device, non_blocking=True) for t in self.spans)), ends)


def pack_captions(captions_BC: Tensor) -> PackedCaptions:
    """(B, C) int64 on the host: start, words, end-of-text (the row's largest id), zeros -> packed rows.

    First-fit decreasing: the longest captions open rows, shorter ones fill them up.
    """
    ids_BC = captions_BC.numpy()
    length_B = ids_BC.argmax(axis=1) + 1
    width = row_width(ids_BC.shape[1])
    bins = _first_fit(length_B.tolist(), width)
    return _lay_out(ids_BC, length_B, bins, _rung(len(bins)), width)


def row_width(context: int) -> int:
    """Slots of a packed row: the context, aligned up to 16."""
    return -(-context // ALIGN) * ALIGN


def one_a_row(captions_BC: Tensor) -> PackedCaptions:
    """Every caption in a row of its own, padding and all: what a tower without packing computes; for comparison."""
    count, width = captions_BC.shape
    packed = _lay_out(captions_BC.numpy(), np.full(count, width), [[row] for row in range(count)], count, width)
    return packed._replace(ends_B=torch.arange(count) * width + captions_BC.argmax(dim=1))


def _first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Captions of each row, filled row by row with the longest caption that still fits."""
    waiting: list[list[int]] = [[] for _ in range(width + 1)]  # by length
    for caption in reversed(range(len(lengths))):
        waiting[lengths[caption]].append(caption)
    bins, left = [], len(lengths)
    while left:
        row: list[int] = []
        room = width
        for length in range(width, 0, -1):
            while length <= room and waiting[length]:
                row.append(waiting[length].pop())
                room -= length
        bins.append(row)
        left -= len(row)
    return bins


def _rung(rows: int) -> int:
    """The ladder's next rung: every number up to 16, then 8 an octave; less than an eighth of the rows stays empty."""
    step = max(1, 2 ** (rows - 1).bit_length() // 16)
    return -(-rows // step) * step


def _lay_out(ids_BC: Ids, length_B: Ids, bins: list[list[int]], rows: int, width: int) -> PackedCaptions:
    """`bins` lists the captions of each row. Arithmetic of the host, in numpy: no device is asked for anything."""
    order_N = np.array([caption for row in bins for caption in row], dtype=np.int64)
    length_N = length_B[order_N]
    row_N = np.repeat(np.arange(len(bins)), [len(row) for row in bins])
    used_R = np.bincount(row_N, weights=length_N, minlength=rows).astype(np.int64)
    before_N, before_R = length_N.cumsum() - length_N, used_R.cumsum() - used_R  # tokens of earlier captions, rows
    start_N = row_N * width + before_N - before_R[row_N]  # where each caption begins in the flattened rows

    position_T = np.arange(length_N.sum()) - before_N.repeat(length_N)
    slot_T, caption_T = start_N.repeat(length_N) + position_T, order_N.repeat(length_N)
    tokens, positions, spans = (np.zeros(rows * width, kind) for kind in (np.int64, np.int64, np.int32))
    tokens[slot_T], positions[slot_T], spans[slot_T] = ids_BC[caption_T, position_T], position_T, caption_T + 1
    end_B = np.empty_like(order_N)
    end_B[order_N] = start_N + length_N - 1
    tokens_RC, positions_RC, ids_RC = (torch.from_numpy(x).view(rows, width) for x in (tokens, positions, spans))
    offsets = torch.from_numpy(_offsets(start_N, used_R, width))
    return PackedCaptions(tokens_RC, positions_RC, Spans(ids_RC, offsets), torch.from_numpy(end_B))


def _offsets(start_N: Ids, used_R: Ids, width: int) -> NDArray[np.int32]:
    """(N + R + 1,): where each span begins, the empty ends of rows being spans too, and the end of all."""
    fill_R = np.arange(len(used_R)) * width + used_R
    starts = np.sort(np.concatenate((start_N, fill_R)))  # a full row's empty end begins where the next row does
    return np.append(starts, len(used_R) * width).astype(np.int32)
