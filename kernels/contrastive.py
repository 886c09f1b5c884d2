"""Contrastive losses computed tile by tile: every image against every caption, and never a matrix of all scores.

The plain formula holds B x A scores, their softmax and its gradient: 4 GiB each at 32,768 pairs. Here one tile of
scores is computed by a matrix product, used while it is in cache, and overwritten by the next. The softmax keeps a
running maximum and sum for each row and column (online log-sum-exp); its backward pass computes each tile a second
time. Memory is linear in B and A; of the six products that the plain softmax loss takes, four are left, because one
score serves both directions.

    loss, accuracy = softmax_contrast(image_BE, text_BE, scale)        # both (B, E), L2-normalised; scale (1,)
    loss, accuracy = sigmoid_contrast(image_BE, text_BE, scale, bias)
    loss.backward()

The file in order: the two losses, their plain formulas (oracles), the loops over tiles (`_Softmax`, `_Sigmoid`), the
operations on one tile (`TileBackend`) in plain torch (`TorchTiles`). kernels/contrastive_triton.py has them in Triton.

Letters: B own rows, A rows of all ranks, E width of the joint space, R x C a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A log-sum-exp as max and sum of exp(score - max): max + log(sum); apart they keep the last digits.
MaxAndSum = tuple[Tensor, Tensor]
MergeOverRanks = Callable[[Tensor, Tensor], MaxAndSum]
BACKENDS = ("torch", "triton")


def softmax_contrast(
    image_BE: Tensor,
    text_AE: Tensor,
    scale: Tensor,
    first: int = 0,
    merge: MergeOverRanks = lambda max_A, sum_A: (max_A, sum_A),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """InfoNCE, both directions averaged, as a scalar; and the fraction of images whose own caption scores highest.

    Image i's caption is row first + i of `text_AE`. On several ranks A = all rows, and `merge` turns each caption's
    largest score and sum of exponentials over this rank's images into those over all ranks' images; the gradient of
    this rank's scores is then the sum of the gradients of all ranks' losses, undivided. `backend`: torch, triton, or
    auto (triton on CUDA, else torch). Oracle: softmax_reference.
    """
    loss, accuracy = _Softmax.apply(image_BE, text_AE, scale, first, merge, resolve_tiles(backend, image_BE.device))
    return loss, accuracy


def sigmoid_contrast(
    image_BE: Tensor, text_AE: Tensor, scale: Tensor, bias: Tensor, first: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss of the own images against all captions, divided by B, as a scalar; and the accuracy as above.

    A tile's gradient needs no other tile, so it is computed in the forward pass, while the tile is there. Oracle:
    sigmoid_reference.
    """
    loss, accuracy = _Sigmoid.apply(image_BE, text_AE, scale, bias, first, resolve_tiles(backend, image_BE.device))
    return loss, accuracy


def softmax_reference(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle of softmax_contrast on one rank: the plain formula with the whole score matrix."""
    image_logits_BB, text_logits_BB = scale * image_BE @ text_BE.T, scale * text_BE @ image_BE.T
    answer_B = torch.arange(len(image_BE), device=image_BE.device)
    loss = (F.cross_entropy(image_logits_BB, answer_B) + F.cross_entropy(text_logits_BB, answer_B)) / 2
    return loss, (image_logits_BB.detach().argmax(dim=1) == answer_B).float().mean()


def sigmoid_reference(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle of sigmoid_contrast on one rank: the plain formula with the whole score matrix."""
    logits_BB = scale * image_BE @ text_BE.T + bias
    answer_B = torch.arange(len(image_BE), device=image_BE.device)
    sign_BB = torch.full_like(logits_BB, -1.0).scatter_(1, answer_B[:, None], 1.0)
    loss = -F.logsigmoid(sign_BB * logits_BB).sum() / len(image_BE)
    return loss, (logits_BB.detach().argmax(dim=1) == answer_B).float().mean()


def resolve_tiles(backend: str, device: torch.device) -> TileBackend:
    """Return the tile operations of `backend` for `device`.

    Raises ValueError for a name that is no backend, ImportError where Triton is not installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"contrastive backend {backend!r} is not known; choose auto, {' or '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return TorchTiles()
    tiles: TileBackend = import_module("kernels.contrastive_triton").TritonTiles()
    return tiles


class _Softmax(torch.autograd.Function):
    """softmax_contrast: forward keeps log-sum-exps of rows and columns, backward computes the tiles again."""

    @staticmethod
    def forward(
        ctx: Any, image_BE: Tensor, text_AE: Tensor, scale: Tensor, first: int, merge: MergeOverRanks, ops: TileBackend
    ) -> tuple[Tensor, Tensor]:
        num_rows = len(image_BE)
        rows = RunningLogSumExp.empty(num_rows, image_BE)
        columns = RunningLogSumExp.empty(len(text_AE), image_BE)
        own_score_B = torch.empty_like(rows.max)
        for row, column, tile_RC in _ScoreTiles(ops, scale * image_BE, text_AE):
            diagonal = row.start + first - column.start
            pair_scores = pair_diagonal(tile_RC, diagonal)
            own_score_B[row][max(0, -diagonal) :][: len(pair_scores)] = pair_scores
            ops.update(tile_RC, rows[row], columns[column], column.start)
        max_A, sum_A = merge(columns.max, columns.sum)
        own = slice(first, first + num_rows)
        to_text_B = rows.sum.log() + (rows.max - own_score_B)
        to_image_B = sum_A[own].log() + (max_A[own] - own_score_B)
        ctx.save_for_backward(image_BE, text_AE, scale, rows.max, rows.sum, max_A, sum_A)
        ctx.first, ctx.ops = first, ops
        return (to_text_B + to_image_B).sum() / (2 * num_rows), _accuracy(ctx, rows, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image_BE, text_AE, scale, max_B, sum_B, max_A, sum_A = ctx.saved_tensors
        tiles, sums = _ScoreTiles(ctx.ops, scale * image_BE, text_AE), _GradientSums.zeros(image_BE, text_AE)
        for row, column, tile_RC in tiles:
            diagonal = row.start + ctx.first - column.start
            of_rows, of_columns = (max_B[row], sum_B[row]), (max_A[column], sum_A[column])
            tiles.add_gradients(sums, row, column, ctx.ops.softmax_gradient(tile_RC, of_rows, of_columns, diagonal))
        return *sums.input_gradients(image_BE, scale, grad / (2 * len(image_BE))), None, None, None


class _Sigmoid(torch.autograd.Function):
    """sigmoid_contrast: forward computes loss and gradients together, backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, image_BE: Tensor, text_AE: Tensor, scale: Tensor, bias: Tensor, first: int, ops: TileBackend
    ) -> tuple[Tensor, Tensor]:
        num_rows, wants_grad = len(image_BE), any(ctx.needs_input_grad)
        rows, sums = RunningLogSumExp.empty(num_rows, image_BE), _GradientSums.zeros(image_BE, text_AE)
        tiles = _ScoreTiles(ops, scale * image_BE, text_AE)
        loss, bias_grad = torch.zeros_like(bias), torch.zeros_like(bias)
        for row, column, tile_RC in tiles:
            tile_RC.add_(bias)
            ops.update_max(tile_RC, rows[row], column.start)
            gradient, tile_loss, tile_bias_grad = ops.sigmoid_gradient(tile_RC, row.start + first - column.start)
            loss += tile_loss
            if wants_grad:
                bias_grad += tile_bias_grad
                tiles.add_gradients(sums, row, column, gradient)
        ctx.save_for_backward(*sums.input_gradients(image_BE, scale, 1 / num_rows), bias_grad / num_rows)
        return loss.squeeze(0) / num_rows, _accuracy(ctx, rows, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * of_input for of_input in ctx.saved_tensors), None, None


class _ScoreTiles:
    """Iterate over the tiles of scaled_BE @ text_AE.T with their rows and columns; all tiles share one buffer."""

    def __init__(self, ops: TileBackend, scaled_BE: Tensor, text_AE: Tensor) -> None:
        self._ops, (self._scaled_BX, self._text_AX) = ops, ops.prepare(scaled_BE, text_AE)
        self._tile_shape = num_rows, num_columns = ops.tile_shape(len(scaled_BE))
        self._buffer = text_AE.new_empty(min(num_rows, len(scaled_BE)) * min(num_columns, len(text_AE)))

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        num_rows, num_columns = self._tile_shape
        for row in _slices(len(self._scaled_BX), num_rows):
            for column in _slices(len(self._text_AX), num_columns):
                left_RX, right_CX = self._scaled_BX[row], self._text_AX[column]
                tile_RC = self._buffer[: len(left_RX) * len(right_CX)].view(len(left_RX), len(right_CX))
                yield row, column, self._ops.scores(left_RX, right_CX, tile_RC)

    def add_gradients(self, sums: _GradientSums, row: slice, column: slice, gradient: Tensor) -> None:
        """Add a tile's contribution to the gradients of its rows and columns."""
        left_RX, right_CX = self._scaled_BX[row], self._text_AX[column]
        self._ops.add_gradients(gradient, left_RX, right_CX, sums.scaled_BE[row], sums.text_AE[column])


@dataclass(frozen=True)
class _GradientSums:
    """Sums over tiles: the gradients of scaled_BE = scale * image_BE and of text_AE."""

    scaled_BE: Tensor
    text_AE: Tensor

    @classmethod
    def zeros(cls, image_BE: Tensor, text_AE: Tensor) -> _GradientSums:
        return cls(torch.zeros_like(image_BE), torch.zeros_like(text_AE))

    def input_gradients(self, image_BE: Tensor, scale: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of image_BE, text_AE and scale, times `factor`."""
        scale_grad = (self.scaled_BE * image_BE).sum().view(1) * factor
        return self.scaled_BE * (scale * factor), self.text_AE * factor, scale_grad


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _accuracy(ctx: Any, rows: RunningLogSumExp, first: int) -> Tensor:
    answer_B = torch.arange(len(rows.max_idx), device=rows.max_idx.device) + first
    accuracy = (rows.max_idx == answer_B).float().mean()
    ctx.mark_non_differentiable(accuracy)
    return accuracy


@dataclass(frozen=True)
class RunningLogSumExp:
    """Running log-sum-exp and argmax of n rows (or columns) over the scores seen so far: max + log(sum)."""

    max: Tensor  # (n,) the largest score
    sum: Tensor  # (n,) sum of exp(score - max)
    max_idx: Tensor  # (n,) int64: index of the largest score, the first one of equals

    @classmethod
    def empty(cls, count: int, like: Tensor) -> RunningLogSumExp:
        """Before the first tile, on the device and in the dtype of `like`."""
        return cls(
            max=like.new_full((count,), -torch.inf),
            sum=like.new_zeros(count),
            max_idx=torch.zeros(count, dtype=torch.int64, device=like.device),
        )

    def __getitem__(self, rows: slice) -> RunningLogSumExp:
        """A view of some rows: writing to it writes here."""
        return RunningLogSumExp(self.max[rows], self.sum[rows], self.max_idx[rows])


class TileBackend(Protocol):
    """Operations on one tile of scores (R, C). `diagonal` is the column minus the row of a pair: the offset of
    torch.diagonal."""

    size: tuple[int, int]  # rows, columns

    def tile_shape(self, num_rows: int) -> tuple[int, int]:
        """Rows and columns of a tile, where there are `num_rows` rows in all."""
        ...

    def prepare(self, left_BE: Tensor, right_AE: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of all products in the form that the other methods take, row by row: (B, X), (A, X)."""
        ...

    def scores(self, left_RX: Tensor, right_CX: Tensor, out: Tensor) -> Tensor:
        """Write the (R, C) float32 products of some rows and columns to `out`."""
        ...

    def add_gradients(
        self, gradient: Tensor, left_RX: Tensor, right_CX: Tensor, left_grad_RE: Tensor, right_grad_CE: Tensor
    ) -> None:
        """Add a tile's contribution to the gradients of both sides; `gradient` as the methods below return it."""
        ...

    def update(self, tile_RC: Tensor, rows: RunningLogSumExp, columns: RunningLogSumExp, start: int) -> None:
        """Add the tile, whose first column is number `start`, to the statistics of its rows and columns.

        May overwrite the tile.
        """
        ...

    def update_max(self, tile_RC: Tensor, rows: RunningLogSumExp, start: int) -> None:
        """Add the tile to the rows' `max` and `max_idx`; `sum` is not needed."""
        ...

    def softmax_gradient(self, tile_RC: Tensor, of_rows: MaxAndSum, of_columns: MaxAndSum, diagonal: int) -> Tensor:
        """score -> softmax along its row + softmax along its column, less 2 on the diagonal. May overwrite the tile."""
        ...

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
        """score -> sigmoid(score), less 1 on the diagonal; with it the sums of the logistic losses and of the gradient,
        (1,) each. May overwrite the tile."""
        ...


class TorchTiles:
    """TileBackend in plain torch. A tile and its exponentials are 4 MiB in float32: they stay in a CPU's cache."""

    size = (512, 1024)

    def tile_shape(self, num_rows: int) -> tuple[int, int]:
        """`size`, whatever the number of rows."""
        return self.size

    def prepare(self, left_BE: Tensor, right_AE: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides unchanged."""
        return left_BE, right_AE

    def scores(self, left_RX: Tensor, right_CX: Tensor, out: Tensor) -> Tensor:
        """One matrix product."""
        return torch.mm(left_RX, right_CX.T, out=out)

    def add_gradients(
        self, gradient: Tensor, left_RX: Tensor, right_CX: Tensor, left_grad_RE: Tensor, right_grad_CE: Tensor
    ) -> None:
        """One matrix product for each side."""
        left_grad_RE.addmm_(gradient, right_CX)
        right_grad_CE.addmm_(gradient.T, left_RX)

    def update(self, tile_RC: Tensor, rows: RunningLogSumExp, columns: RunningLogSumExp, start: int) -> None:
        """Overwrite the tile with the columns' exponentials; those of the rows are computed on a copy."""
        before_R = rows.max.clone()
        self.update_max(tile_RC, rows, start)
        _add_to_sum(rows, before_R, (tile_RC - rows.max[:, None]).exp_().sum(dim=1))
        before_C = columns.max.clone()
        torch.maximum(before_C, tile_RC.amax(dim=0), out=columns.max)
        _add_to_sum(columns, before_C, tile_RC.sub_(columns.max).exp_().sum(dim=0))

    def update_max(self, tile_RC: Tensor, rows: RunningLogSumExp, start: int) -> None:
        """Of equal scores keep the earlier column."""
        max_R, idx_R = tile_RC.max(dim=1)
        rows.max_idx.copy_(torch.where(max_R > rows.max, idx_R + start, rows.max_idx))
        torch.maximum(rows.max, max_R, out=rows.max)

    def softmax_gradient(self, tile_RC: Tensor, of_rows: MaxAndSum, of_columns: MaxAndSum, diagonal: int) -> Tensor:
        """Computed in place."""
        by_row_RC = (tile_RC - of_rows[0][:, None]).exp_().div_(of_rows[1][:, None])
        tile_RC.sub_(of_columns[0]).exp_().div_(of_columns[1])
        for softmax_RC in (by_row_RC, tile_RC):  # each before the sum: near 1 a pair's difference has few digits
            pair_diagonal(softmax_RC, diagonal).sub_(1.0)
        return tile_RC.add_(by_row_RC)

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
        """Computed in place."""
        pair_diagonal(tile_RC, diagonal).neg_()  # pairs have the opposite label: softplus(-x), -sigmoid(-x)
        loss = F.softplus(tile_RC).sum().view(1)
        tile_RC.sigmoid_()
        pair_diagonal(tile_RC, diagonal).neg_()
        return tile_RC, loss, tile_RC.sum().view(1)


def _add_to_sum(running: RunningLogSumExp, max_before: Tensor, new_sum: Tensor) -> None:
    """Add sums of exp(score - running.max) to running sums that were relative to `max_before`."""
    running.sum.mul_((max_before - running.max).exp_()).add_(new_sum)


def pair_diagonal(tile_RC: Tensor, diagonal: int) -> Tensor:
    """The scores of pairs: a view of the tile's diagonal, empty where it runs past the tile."""
    rows, columns = tile_RC.shape
    return tile_RC.diagonal(diagonal) if -rows < diagonal < columns else tile_RC[:0].flatten()
