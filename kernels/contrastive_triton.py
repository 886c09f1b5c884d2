"""Tile operations of the contrastive losses in Triton: each tile of scores is read once between two matrix products.

Matrix products stay with cuBLAS, which no short kernel beats at widths of 512 and more; in plain torch, the steps
between them would read and write a tile in GPU memory eight times. Import this module only where Triton is to run.

A product of two float32 matrices would run on CUDA cores, at a fifteenth of the rate of the tensor cores. So each
number is split into two bf16 ones, x = high + low + 2^-18 x, and a product is three of bf16 summed in float32,
high high + high low + low high: relative errors of 1e-5 (docs/decisions/triton_kernels.md), at a third of the rate.

    TritonTiles().softmax_gradient(tile_RC, (max_R, sum_R), (max_C, sum_C), diagonal=0)
"""

# mypy: disallow_untyped_defs=false, disallow_incomplete_defs=false
# (Triton reads a kernel's annotations itself: a pointer or a number has none.)

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contrastive import MaxAndSum, RunningLogSumExp

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f"contrastive backend triton: {error}; Triton comes with PyTorch's CUDA builds for Linux; choose torch"
    ) from None

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
NO_SCORE = tl.constexpr(-1e38)  # finite: minus infinity less itself would be NaN
MERGE_ROWS = 64  # rows or columns of one program that merges the statistics of blocks


class TritonTiles:
    """TileBackend in Triton. A tile is 64 MiB in float32: large enough to keep cuBLAS busy, small beside a model.

    Its gradient is (2, R, C) bf16, the high and the low part, in a buffer that all tiles of a pass share.
    """

    size = (4096, 4096)

    def __init__(self) -> None:
        self._gradient = torch.empty(0)

    def tile_shape(self, num_rows: int) -> tuple[int, int]:
        """A tile of few rows has more columns: one rank's rows against all captions are few launches."""
        rows, columns = self.size
        fewer = max(1, min(num_rows, rows))
        return fewer, rows * columns // fewer

    def prepare(self, left_BE: Tensor, right_AE: Tensor) -> tuple[Tensor, Tensor]:
        """[high, high, low] and [high, low, high] side by side, bf16: all three products are one of three times the
        width."""
        (left_high, left_low), (right_high, right_low) = _split(left_BE), _split(right_AE)
        return torch.cat([left_high, left_high, left_low], 1), torch.cat([right_high, right_low, right_high], 1)

    def scores(self, left_RX: Tensor, right_CX: Tensor, out: Tensor) -> Tensor:
        """One product, three times as wide as the vectors."""
        return _product(left_RX, right_CX.T, out)

    def add_gradients(
        self, gradient: Tensor, left_RX: Tensor, right_CX: Tensor, left_grad_RE: Tensor, right_grad_CE: Tensor
    ) -> None:
        """high [high, low] + low high, on either side."""
        width = left_grad_RE.shape[1]
        high_RC, low_RC = gradient
        _add_products(left_grad_RE, high_RC, low_RC, right_CX[:, : 2 * width])
        _add_products(right_grad_CE, high_RC.T, low_RC.T, left_RX[:, width:])

    def update(self, tile_RC: Tensor, rows: RunningLogSumExp, columns: RunningLogSumExp, start: int) -> None:
        """Leave the tile unchanged. `max_idx` of the columns is meaningless: it counts rows of this tile."""
        by_row, by_column = self._block_statistics(tile_RC)
        _merge_blocks(by_row, rows, start)
        _merge_blocks(by_column, columns, 0)  # nothing reads the index of a column's largest score

    def update_max(self, tile_RC: Tensor, rows: RunningLogSumExp, start: int) -> None:
        """Update the sums too: they cost nothing beside reading the tile."""
        _merge_blocks(self._block_statistics(tile_RC)[0], rows, start)

    def softmax_gradient(self, tile_RC: Tensor, of_rows: MaxAndSum, of_columns: MaxAndSum, diagonal: int) -> Tensor:
        """The tile must be contiguous: the kernel addresses it by its shape alone."""
        gradient = self._gradient_like(tile_RC)
        _softmax_gradient[_grid(tile_RC)](
            tile_RC, *gradient, *tile_RC.shape, *of_rows, *of_columns, diagonal, BLOCK_ROWS, BLOCK_COLUMNS
        )
        return gradient

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tile must be contiguous, as in `softmax_gradient`. Each program writes its own sums; no atomics."""
        gradient, grid = self._gradient_like(tile_RC), _grid(tile_RC)
        sums = tile_RC.new_empty(2, *grid)
        _sigmoid_gradient[grid](tile_RC, *gradient, *tile_RC.shape, diagonal, *sums, BLOCK_ROWS, BLOCK_COLUMNS)
        loss, grad_sum = sums.flatten(1).sum(dim=1, keepdim=True)
        return gradient, loss, grad_sum

    def _block_statistics(self, tile_RC: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Largest score, sum of exponentials and index of the largest score of every block's rows, and of its columns.

        Shapes: (blocks along the other side, rows or columns) each.
        """
        (num_rows, num_columns), (row_blocks, column_blocks) = tile_RC.shape, _grid(tile_RC)
        by_row = _statistics_of(tile_RC, column_blocks, num_rows)
        by_column = _statistics_of(tile_RC, row_blocks, num_columns)
        _statistics[row_blocks, column_blocks](
            tile_RC, num_rows, num_columns, *by_row, *by_column, BLOCK_ROWS, BLOCK_COLUMNS
        )
        return by_row, by_column

    def _gradient_like(self, tile_RC: Tensor) -> Tensor:
        count = 2 * tile_RC.numel()
        if len(self._gradient) < count or self._gradient.device != tile_RC.device:
            self._gradient = torch.empty(count, dtype=torch.bfloat16, device=tile_RC.device)
        return self._gradient[:count].view(2, *tile_RC.shape)


def _split(x_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into high + low, both bf16; the remainder is 2^-18 of x."""
    high_BE = x_BE.bfloat16()
    return high_BE, (x_BE - high_BE).bfloat16()


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 product of two bf16 matrices. On the CPU (Triton's interpreter) torch has none: cast to float32."""
    if left.device.type == "cpu":
        return torch.mm(left.float(), right.float(), out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_products(sum_RE: Tensor, high_RC: Tensor, low_RC: Tensor, factors_CX: Tensor) -> None:
    """sum += (high + low) @ (high + low) without low low; `factors_CX` are the other side's [high, low]."""
    high_RX, width = _product(high_RC, factors_CX), sum_RE.shape[1]
    sum_RE += high_RX[:, :width]
    sum_RE += high_RX[:, width:]
    sum_RE += _product(low_RC, factors_CX[:, :width])


def _statistics_of(tile_RC: Tensor, blocks: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    best, total = tile_RC.new_empty(2, blocks, count)
    return best, total, torch.empty(blocks, count, dtype=torch.int32, device=tile_RC.device)


def _merge_blocks(blocks: tuple[Tensor, ...], running: RunningLogSumExp, start: int) -> None:
    num_blocks, count = blocks[0].shape
    _merge[(triton.cdiv(count, MERGE_ROWS),)](
        *blocks, num_blocks, count, start, running.max, running.sum, running.max_idx, MERGE_ROWS
    )


def _grid(tile_RC: Tensor) -> tuple[int, int]:
    return triton.cdiv(tile_RC.shape[0], BLOCK_ROWS), triton.cdiv(tile_RC.shape[1], BLOCK_COLUMNS)


@triton.jit
def _block(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows, columns, element offsets and mask of this program's block of the tile."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offset = row[:, None].to(tl.int64) * num_columns + column[None, :]
    return row, column, offset, (row < num_rows)[:, None] & (column < num_columns)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _statistics(
    tile, num_rows, num_columns, row_best, row_total, row_idx, column_best, column_total, column_idx,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Statistics of a block's rows and columns; the tile is read once, for both directions."""
    row, column, offset, mask = _block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    score = tl.load(tile + offset, mask=mask, other=NO_SCORE)
    best, idx = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
    to = tl.program_id(1) * num_rows + row
    tl.store(row_best + to, best, mask=row < num_rows)
    tl.store(row_total + to, tl.sum(tl.exp(score - best[:, None]), axis=1), mask=row < num_rows)
    tl.store(row_idx + to, tl.program_id(1) * BLOCK_COLUMNS + idx, mask=row < num_rows)
    best, idx = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    to = tl.program_id(0) * num_columns + column
    tl.store(column_best + to, best, mask=column < num_columns)
    tl.store(column_total + to, tl.sum(tl.exp(score - best[None, :]), axis=0), mask=column < num_columns)
    tl.store(column_idx + to, tl.program_id(0) * BLOCK_ROWS + idx, mask=column < num_columns)


@triton.jit(do_not_specialize=["num_blocks", "count", "start"])
def _merge(block_best, block_total, block_idx, num_blocks, count, start, best_ptr, total_ptr, idx_ptr,
           MERGE_ROWS: tl.constexpr):  # fmt: skip
    """Add the statistics of blocks, in order, to the running ones: of equal scores the first is kept."""
    row = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    is_row = row < count
    best = tl.load(best_ptr + row, mask=is_row, other=0.0)
    total = tl.load(total_ptr + row, mask=is_row, other=0.0)
    idx = tl.load(idx_ptr + row, mask=is_row, other=0)
    for block in range(num_blocks):
        here = tl.load(block_best + block * count + row, mask=is_row, other=0.0)
        where = tl.load(block_idx + block * count + row, mask=is_row, other=0)
        more = tl.load(block_total + block * count + row, mask=is_row, other=0.0)
        idx = tl.where(here > best, start + where, idx)
        after = tl.maximum(best, here)
        total = total * tl.exp(best - after) + more * tl.exp(here - after)
        best = after
    tl.store(best_ptr + row, best, mask=is_row)
    tl.store(total_ptr + row, total, mask=is_row)
    tl.store(idx_ptr + row, idx, mask=is_row)


@triton.jit
def _store_split(high, low, offset, value, mask):
    """Store value as high + low, both bf16."""
    rounded = value.to(tl.bfloat16)
    tl.store(high + offset, rounded, mask=mask)
    tl.store(low + offset, (value - rounded.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "diagonal"])
def _softmax_gradient(
    tile, high, low, num_rows, num_columns, row_best, row_total, column_best, column_total, diagonal,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, offset, mask = _block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    is_row, is_column = row < num_rows, column < num_columns
    score = tl.load(tile + offset, mask=mask, other=0.0)
    by_row = tl.exp(score - tl.load(row_best + row, mask=is_row, other=0.0)[:, None])
    by_column = tl.exp(score - tl.load(column_best + column, mask=is_column, other=0.0)[None, :])
    by_row *= (1.0 / tl.load(row_total + row, mask=is_row, other=1.0))[:, None]
    by_column *= (1.0 / tl.load(column_total + column, mask=is_column, other=1.0))[None, :]
    answer = tl.where(column[None, :] - row[:, None] == diagonal, 1.0, 0.0)
    _store_split(high, low, offset, (by_row - answer) + (by_column - answer), mask)


@triton.jit(do_not_specialize=["num_rows", "diagonal"])
def _sigmoid_gradient(
    tile, high, low, num_rows, num_columns, diagonal, losses, grad_sums,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, offset, mask = _block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    sign = tl.where(column[None, :] - row[:, None] == diagonal, -1.0, 1.0)
    score = sign * tl.load(tile + offset, mask=mask, other=0.0)
    small = tl.exp(-tl.abs(score))  # at most 1, whatever the score
    grad = sign * tl.where(score >= 0, 1.0, small) / (1.0 + small)
    _store_split(high, low, offset, grad, mask)
    loss = tl.maximum(score, 0.0) + tl.log(1.0 + small)
    to = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + to, tl.sum(tl.sum(tl.where(mask, loss, 0.0), axis=1), axis=0))
    tl.store(grad_sums + to, tl.sum(tl.sum(tl.where(mask, grad, 0.0), axis=1), axis=0))
