"""Collectives that losses may use: an interface, and its implementation for one rank.

Losses never import torch.distributed. They take a `Comm`: `Solo` on one rank, `engine.distributed.Ranks` on several.

The gradient contract. ZeRO averages gradients over ranks, and each rank's loss is the mean over its own rows;
so the backward of `gather_with_grad` gives a rank the SUM of the gradients of all ranks' losses at its rows,
undivided. The average over ranks is then the gradient of the full batch exactly. (Without the gradient
through the gather it is 47 % off.)

    comm.rank, comm.world_size             # 1, 2
    comm.gather_with_grad(x_BE).shape      # (2B, E); rows B to 2B are rank 1's own
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Comm(Protocol):
    """Collectives over ranks: every rank calls the same ones in the same order, with tensors of one shape."""

    @property
    def rank(self) -> int:
        """Index of this rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """(B, ...) -> (world_size * B, ...), rank by rank; B must be the same on every rank."""
        ...

    def all_sum(self, x: Tensor) -> Tensor:
        """The elementwise sum over ranks, without gradient; `x` is unchanged."""
        ...

    def all_max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks, without gradient; `x` is unchanged."""
        ...


class Solo:
    """Comm of a single rank: every collective is the identity."""

    rank = 0
    world_size = 1

    def gather_with_grad(self, x: Tensor) -> Tensor:
        return x

    def all_sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def all_max(self, x: Tensor) -> Tensor:
        return x.detach().clone()
