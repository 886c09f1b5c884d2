"""Triton's part of the contrastive losses: what happens to a tile of scores between two matrix products, in one pass.

Products stay cuBLAS's, which no short kernel beats at widths of 512 and more; left to torch, the steps between them
would read and write a tile in GPU memory eight times. Import it only where Triton is to run.

    TritonTiles().softmax_gradient(tile_RC, (best_R, total_R), (best_C, total_C), diagonal=0)     # in place
"""

# mypy: disallow_untyped_defs=false, disallow_incomplete_defs=false
# (Triton reads a kernel's annotations itself: a pointer or a number has none.)

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contrastive_tiles import Online, Sums

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f"contrastive backend triton: {error}; Triton comes with PyTorch's CUDA builds for Linux; choose torch"
    ) from None

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128


class TritonTiles:
    """A tile is 64 MiB in float32: large enough to keep cuBLAS busy, small beside a model."""

    size = (4096, 4096)

    def follow(self, tile_RC: Tensor, rows: Online, columns: Online, start: int) -> None:
        """Leaves the tile as it is. `idx` of the columns is meaningless: it counts rows of this tile."""
        self.follow_best(tile_RC, rows, start)
        self.follow_best(tile_RC.T, columns, 0)  # where a column's best score stands, nobody asks

    def follow_best(self, tile_RC: Tensor, rows: Online, start: int) -> None:
        """Follows the sums too: they cost nothing beside reading the tile."""
        num_rows, num_columns = tile_RC.shape
        _follow[(triton.cdiv(num_rows, BLOCK_ROWS),)](
            tile_RC, *tile_RC.stride(), num_rows, num_columns, start, rows.best, rows.total, rows.idx,
            BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip

    def softmax_gradient(self, tile_RC: Tensor, row_sums: Sums, column_sums: Sums, diagonal: int) -> None:
        """The tile must be contiguous: the kernel addresses it by its shape alone."""
        _softmax_gradient[_grid(tile_RC)](
            tile_RC, *tile_RC.shape, *row_sums, *column_sums, diagonal, BLOCK_ROWS, BLOCK_COLUMNS
        )

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> Tensor:
        """The tile must be contiguous, as in `softmax_gradient`. Programs write their sums apart; no atomics."""
        grid = _grid(tile_RC)
        sums = torch.empty(grid, dtype=tile_RC.dtype, device=tile_RC.device)
        _sigmoid_gradient[grid](tile_RC, *tile_RC.shape, diagonal, sums, BLOCK_ROWS, BLOCK_COLUMNS)
        return sums.sum().view(1)


def _grid(tile_RC: Tensor) -> tuple[int, int]:
    return triton.cdiv(tile_RC.shape[0], BLOCK_ROWS), triton.cdiv(tile_RC.shape[1], BLOCK_COLUMNS)


@triton.jit
def _follow(
    tile, row_stride, column_stride, num_rows, num_columns, start, best_ptr, total_ptr, idx_ptr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS rows of the tile a program: online maximum, its first place, and sum of exponentials."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    best = tl.load(best_ptr + row, mask=is_row, other=0.0)
    total = tl.load(total_ptr + row, mask=is_row, other=0.0)
    idx = tl.load(idx_ptr + row, mask=is_row, other=0)
    for begin in range(0, num_columns, BLOCK_COLUMNS):
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        place = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        mask = is_row[:, None] & (column < num_columns)[None, :]
        score = tl.load(tile + place, mask=mask, other=-float("inf"))
        here, where = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        idx = tl.where(here > best, start + begin + where, idx)
        after = tl.maximum(best, here)
        total = total * tl.exp(best - after) + tl.sum(tl.exp(score - after[:, None]), axis=1)
        best = after
    tl.store(best_ptr + row, best, mask=is_row)
    tl.store(total_ptr + row, total, mask=is_row)
    tl.store(idx_ptr + row, idx, mask=is_row)


@triton.jit
def _softmax_gradient(
    tile, num_rows, num_columns, row_best, row_total, column_best, column_total, diagonal,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    place = tile + row[:, None].to(tl.int64) * num_columns + column[None, :]
    is_row, is_column = row < num_rows, column < num_columns
    mask = is_row[:, None] & is_column[None, :]
    score = tl.load(place, mask=mask, other=0.0)
    by_row = tl.exp(score - tl.load(row_best + row, mask=is_row, other=0.0)[:, None])
    by_column = tl.exp(score - tl.load(column_best + column, mask=is_column, other=0.0)[None, :])
    by_row = by_row / tl.load(row_total + row, mask=is_row, other=1.0)[:, None]
    by_column = by_column / tl.load(column_total + column, mask=is_column, other=1.0)[None, :]
    answer = tl.where(column[None, :] - row[:, None] == diagonal, 1.0, 0.0)
    tl.store(place, (by_row - answer) + (by_column - answer), mask=mask)


@triton.jit
def _sigmoid_gradient(
    tile, num_rows, num_columns, diagonal, sums, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    place = tile + row[:, None].to(tl.int64) * num_columns + column[None, :]
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    sign = tl.where(column[None, :] - row[:, None] == diagonal, -1.0, 1.0)
    score = sign * tl.load(place, mask=mask, other=0.0)
    small = tl.exp(-tl.abs(score))  # at most 1, whatever the score
    tl.store(place, sign * tl.where(score >= 0, 1.0, small) / (1.0 + small), mask=mask)
    loss = tl.maximum(score, 0.0) + tl.log(1.0 + small)
    total = tl.sum(tl.sum(tl.where(mask, loss, 0.0), axis=1), axis=0)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)
