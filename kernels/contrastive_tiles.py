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
    """What is done with one tile of scores. `diagonal` is the column minus the row of a pair: F of torch.diagonal."""

    size: tuple[int, int]  # rows, columns

    def follow(self, tile_RC: Tensor, rows: Online, columns: Online, start: int) -> None:
        """Adds the tile to the statistics of its rows and columns; its first column is number `start`. May overwrite
        the tile."""
        ...

    def follow_best(self, tile_RC: Tensor, rows: Online, start: int) -> None:
        """Adds the tile to the rows' `best` and `idx` alone."""
        ...

    def softmax_gradient(self, tile_RC: Tensor, row_sums: Sums, column_sums: Sums, diagonal: int) -> None:
        """score -> softmax along its row + softmax along its column, less 2 on the diagonal; in place."""
        ...

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> Tensor:
        """score -> sigmoid(score), less 1 on the diagonal; in place. Gives the (1,) sum of the logistic losses."""
        ...


class TorchTiles:
    """Plain torch. A tile and its exponentials are 4 MiB in float32: they stay in a CPU's cache."""

    size = (512, 1024)

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

    def softmax_gradient(self, tile_RC: Tensor, row_sums: Sums, column_sums: Sums, diagonal: int) -> None:
        by_row_RC = (tile_RC - row_sums[0][:, None]).exp_().div_(row_sums[1][:, None])
        tile_RC.sub_(column_sums[0]).exp_().div_(column_sums[1])
        for softmax_RC in (by_row_RC, tile_RC):  # each before the sum: near 1 a pair's difference has few digits
            pairs(softmax_RC, diagonal).sub_(1.0)
        tile_RC.add_(by_row_RC)

    def sigmoid_gradient(self, tile_RC: Tensor, diagonal: int) -> Tensor:
        pairs(tile_RC, diagonal).neg_()  # a pair asks the opposite question: softplus(-x), -sigmoid(-x)
        loss = F.softplus(tile_RC).sum().view(1)
        tile_RC.sigmoid_()
        pairs(tile_RC, diagonal).neg_()
        return loss


def _add(sums: Online, best_before: Tensor, total: Tensor) -> None:
    """Adds sums of exp(score - sums.best) to totals that were relative to `best_before`."""
    sums.total.mul_((best_before - sums.best).exp_()).add_(total)


def pairs(tile_RC: Tensor, diagonal: int) -> Tensor:
    """The scores of pairs: a view of the tile's diagonal, empty where it runs past the tile."""
    rows, columns = tile_RC.shape
    return tile_RC.diagonal(diagonal) if -rows < diagonal < columns else tile_RC[:0].flatten()
