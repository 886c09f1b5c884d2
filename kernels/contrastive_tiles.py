"""A tile of contrastive scores between two matrix products: what is done with it, and torch's way of doing it.

rows = Online.start(512, like=tile_RC)                 # running log-sum-exp of 512 images
TorchTiles().follow(tile_RC, rows, columns, start=0)   # one more tile of their scores
lse_R = rows.best + rows.total.log()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = tuple[Tensor, Tensor]  # best, total: a log-sum-exp is best + log(total); apart they keep the last digits


@dataclass(frozen=True)
class Online:
    """Running statistics of n rows (or columns) over the scores seen so far."""

    best: Tensor  # (n,) the largest score
    total: Tensor  # (n,) sum of exp(score - best)
    idx: Tensor  # (n,) int64: where the largest score stands, the first one of equals

    @classmethod
    def start(cls, count: int, like: Tensor) -> Online:
        """Before the first tile, on the device and in the dtype of `like`."""
        return cls(
            best=like.new_full((count,), -torch.inf),
            total=like.new_zeros(count),
            idx=torch.zeros(count, dtype=torch.int64, device=like.device),
        )

    def __getitem__(self, rows: slice) -> Online:
        """A view: what is written to it is written here."""
        return Online(self.best[rows], self.total[rows], self.idx[rows])


class Tiles(Protocol):
    """The products of a loss and what is done with one tile of scores between them. `diagonal` is the column minus the
    row of a pair: the offset of torch.diagonal."""

    size: tuple[int, int]  # rows, columns

    def shape(self, num_rows: int) -> tuple[int, int]:
        """Rows and columns of a tile, where there are `num_rows` rows in all."""
        ...

    def factors(self, left_BE: Tensor, right_AE: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of all products in the form that the other methods take, a row a row: (B, X), (A, X)."""
        ...

    def scores(self, left_RX: Tensor, right_CX: Tensor, out: Tensor) -> Tensor:
        """The (R, C) float32 products of some rows and columns, written to `out`."""
        ...

    def add_gradients(
        self, gradient: Tensor, left_RX: Tensor, right_CX: Tensor, left_grad_RE: Tensor, right_grad_CE: Tensor
    ) -> None:
        """Adds a tile's part to the gradients of both sides; `gradient` as the methods below return it."""
        ...

    def follow(self, tile_RC: Tensor, rows: Online, columns: Online, start: int) -> None:
        """Adds the tile to the statistics of its rows and columns; its first column is number `start`. May overwrite
        the tile."""
        ...

    def follow_best(self, tile_RC: Tensor, rows: Online, start: int) -> None:
        """Adds the tile to the rows' `best` and `idx` alone."""
        ...

    def softmax_gradient(self, tile_RC: Tensor, row_sums: Sums, column_sums: Sums, diagonal: int) -> Tensor:
        """score -> softmax along its row + softmax along its column, less 2 on the diagonal. May overwrite the tile."""
        ...

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
        """score -> sigmoid(score), less 1 on the diagonal; with it the sums of the logistic losses and of the gradient,
        (1,) each. May overwrite the tile."""
        ...


class TorchTiles:
    """Plain torch. A tile and its exponentials are 4 MiB in float32: they stay in a CPU's cache."""

    size = (512, 1024)

    def shape(self, num_rows: int) -> tuple[int, int]:
        """Always the same."""
        return self.size

    def factors(self, left_BE: Tensor, right_AE: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return left_BE, right_AE

    def scores(self, left_RX: Tensor, right_CX: Tensor, out: Tensor) -> Tensor:
        """One product."""
        return torch.mm(left_RX, right_CX.T, out=out)

    def add_gradients(
        self, gradient: Tensor, left_RX: Tensor, right_CX: Tensor, left_grad_RE: Tensor, right_grad_CE: Tensor
    ) -> None:
        """One product a side."""
        left_grad_RE.addmm_(gradient, right_CX)
        right_grad_CE.addmm_(gradient.T, left_RX)

    def follow(self, tile_RC: Tensor, rows: Online, columns: Online, start: int) -> None:
        """Overwrites the tile: with the columns' exponentials, while the rows' are made of a copy."""
        before_R = rows.best.clone()
        self.follow_best(tile_RC, rows, start)
        _add(rows, before_R, (tile_RC - rows.best[:, None]).exp_().sum(dim=1))
        before_C = columns.best.clone()
        torch.maximum(before_C, tile_RC.amax(dim=0), out=columns.best)
        _add(columns, before_C, tile_RC.sub_(columns.best).exp_().sum(dim=0))

    def follow_best(self, tile_RC: Tensor, rows: Online, start: int) -> None:
        """Of equal scores the earlier column stays."""
        best_R, idx_R = tile_RC.max(dim=1)
        rows.idx.copy_(torch.where(best_R > rows.best, idx_R + start, rows.idx))
        torch.maximum(rows.best, best_R, out=rows.best)

    def softmax_gradient(self, tile_RC: Tensor, row_sums: Sums, column_sums: Sums, diagonal: int) -> Tensor:
        """In place."""
        by_row_RC = (tile_RC - row_sums[0][:, None]).exp_().div_(row_sums[1][:, None])
        tile_RC.sub_(column_sums[0]).exp_().div_(column_sums[1])
        for softmax_RC in (by_row_RC, tile_RC):  # each before the sum: near 1 a pair's difference has few digits
            pairs(softmax_RC, diagonal).sub_(1.0)
        return tile_RC.add_(by_row_RC)

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
        """In place."""
        pairs(tile_RC, diagonal).neg_()  # a pair asks the opposite question: softplus(-x), -sigmoid(-x)
        loss = F.softplus(tile_RC).sum().view(1)
        tile_RC.sigmoid_()
        pairs(tile_RC, diagonal).neg_()
        return tile_RC, loss, tile_RC.sum().view(1)


def _add(sums: Online, best_before: Tensor, total: Tensor) -> None:
    """Adds sums of exp(score - sums.best) to totals that were relative to `best_before`."""
    sums.total.mul_((best_before - sums.best).exp_()).add_(total)


def pairs(tile_RC: Tensor, diagonal: int) -> Tensor:
    """The scores of pairs: a view of the tile's diagonal, empty where it runs past the tile."""
    rows, columns = tile_RC.shape
    return tile_RC.diagonal(diagonal) if -rows < diagonal < columns else tile_RC[:0].flatten()
