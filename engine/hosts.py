"""Features of all ranks, gathered across hosts first and then inside each: fewer turns on the slow link.

Of H hosts with G ranks each, W = H * G, every rank has a block of b bytes that all others want. Bytes and turns:

    way                               leaves a host on the slow link          turns that wait for it
    one ring through all ranks        (W - 1) b                               W - 1
    inside first, every rank sends    G (W - G) b                             H - 1
    inside first, one rank sends      (W - G) b, through one network card     H - 1, and a broadcast inside
    across first, then inside         (W - G) b, over all G cards             H - 1

No way moves less than (W - G) b: so much a host does not have. A ring is within (G - 1) / (W - G) of it: what it loses
is time, not bytes. Gathering inside first makes blocks G times as large before each of G ranks sends them all. So rank
i of a host gathers from the ranks i of all hosts, and the host's ranks then exchange what each of them got. Backward is
the mirror: gradients are summed inside the host first, so that a host sends one sum, not G.

    comm, said = across_hosts(world.Ranks(), "by_host", timeout_minutes=60)
    comm.gather_with_grad(x_BE)                # the rows of world.Ranks, in the same order; the same gradient

NCCL's own trees do part of this from some hundred ranks on; docs/scaling.md says when it pays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs import UserError
from engine import world
from model.losses.comm import Comm


class HostRanks:
    """model.losses.comm.Comm over all ranks; building one is a collective. `ranks` does what is not gathering."""

    def __init__(self, ranks: Comm, per_host: int, timeout_minutes: float) -> None:
        first_of_host = range(0, ranks.world_size, per_host)
        self._ranks = ranks
        self._inside = world.join_group([list(range(at, at + per_host)) for at in first_of_host], timeout_minutes)
        self._across = world.join_group([[at + i for at in first_of_host] for i in range(per_host)], timeout_minutes)
        self._per_host = per_host

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.world_size

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """(B, ...) -> (world_size * B, ...), as world.Ranks has it."""
        gathered: Tensor = _Gather.apply(x, self._inside, self._across, self._per_host)
        return gathered

    def all_sum(self, x: Tensor) -> Tensor:
        return self._ranks.all_sum(x)

    def all_max(self, x: Tensor) -> Tensor:
        return self._ranks.all_max(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: Any, across: Any, per_host: int) -> Tensor:
        ctx.groups, ctx.per_host = (inside, across), per_host
        of_ranks_here = world.gather_rows(world.gather_rows(x, across), inside).view(per_host, -1, *x.shape)
        return of_ranks_here.transpose(0, 1).flatten(0, 2)  # hosts before their ranks, as ranks are counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside, across), rows = ctx.groups, grad.shape[0] // world.world_size()
        of_ranks_here = grad.view(-1, ctx.per_host, rows, *grad.shape[1:]).transpose(0, 1).flatten(0, 2)
        return world.scatter_rows(world.scatter_rows(of_ranks_here, inside), across), None, None, None


def across_hosts(ranks: Comm, way: str, timeout_minutes: float) -> tuple[Comm, str]:
    """The Comm of system.gather, and words on it; a collective. UserError where hosts differ in ranks."""
    if way == "flat":
        return ranks, "flat (system.gather)"
    found = sorted(set(world.gather_objects(world.ranks_here())))
    per_host = found[0]
    if len(found) > 1 or ranks.world_size % per_host:
        raise UserError(
            f"system.gather=by_host on {ranks.world_size} ranks, of which hosts have {' and '.join(map(str, found))}: "
            "ranks meet in pairs of hosts, so each has as many; start as many on each, or set system.gather=flat"
        )
    if per_host in (1, ranks.world_size):
        return ranks, f"flat ({ranks.world_size // per_host} hosts of {per_host}: there is one way alone)"
    hosts = ranks.world_size // per_host
    return HostRanks(ranks, per_host, timeout_minutes), f"across {hosts} hosts, then inside (system.gather=by_host)"
