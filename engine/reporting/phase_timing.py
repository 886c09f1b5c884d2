"""Time the phases of a step, and report their means over ranks and the slowest rank.

    time_children(phases, engine.module, {"trunk": "trunk"})       # once built: hooks on the model's children
    time_calls(phases, engine)                                     # and wrapped calls
    phase_times(phases, comm)                       # {"phase/trunk_ms": 81.2, ..., "straggler/rank": 1.0, ...}

| phase | what is timed |
|---|---|
| data, inputs | the wait for a batch; packing captions and copying to the device |
| teacher, trunk, text, heads, decoder | the forward of that child of the model; heads: all others |
| generator | the forward of a generator, with its loss |
| objectives, backward | the losses; the backward pass, with what it computes again |
| all_gather | fetching parameters (ZeRO-3); the objectives' gathers (their gradient counts for backward) |
| reduce_scatter | bringing gradients into buckets and reducing them, whichever collective the stage has for it |
| all_reduce | sums over ranks in objectives and reports; the gradient's norm |
| optimizer, ema | the step on this rank's shards; the teacher's. ZeRO-1 and 2 gather the new weights within optimizer |
| report | checks, images, checkpoint: of the report before |
| other | the rest of the loop |

`phase/NAME_ms` is the phase's own time in milliseconds per step, mean over ranks; together they are a step's time.
A rank's own time is its step less collectives and reports: what it would need alone. In the collectives the fast ranks
wait for the slow one, so the rank with the most own time is the one that holds up the run: `straggler/rank`, and
`straggler/excess_share`, its excess over the median rank as a share of the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import zero
from model.losses.comm import Comm
from profiling.instruments.phases import PHASES, PhaseTimer

NOT_OWN = ("all_gather", "reduce_scatter", "all_reduce", "report")


class TimedComm:
    """A Comm whose collectives are timed as phases."""

    def __init__(self, comm: Comm, phases: PhaseTimer) -> None:
        self._comm, self._phases = comm, phases

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def world_size(self) -> int:
        return self._comm.world_size

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """Gather, timed as all_gather; its backward counts for the phase it runs in."""
        with self._phases("all_gather"):
            return self._comm.gather_with_grad(x)

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum, timed as all_reduce."""
        with self._phases("all_reduce"):
            return self._comm.all_sum(x)

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum, timed as all_reduce."""
        with self._phases("all_reduce"):
            return self._comm.all_max(x)


def time_children(phases: PhaseTimer, model: nn.Module, children: Mapping[str, str]) -> None:
    """Time the forwards of the model's `children`: name -> phase.

    After `zero.initialize`: its hooks, which gather a child's parameters, stay outside ours; compiled blocks get none.
    """
    for name, phase in children.items():
        child = getattr(model, name)
        if child is not None:
            _time_forward(phases, phase, child)


def time_calls(phases: PhaseTimer, engine: Any) -> None:
    """Time what an engine does: backward, step, and the collectives in them."""
    phases.wrap("backward", engine, "backward")
    phases.wrap("optimizer", engine, "step")
    for phase, owner, method in zero.collectives(engine):
        phases.wrap(phase, owner, method)


def phase_times(phases: PhaseTimer, comm: Comm) -> dict[str, float]:
    """Return the phases' scalars of the steps since the last report. A collective between hosts."""
    reading = phases.read()
    if not reading.ms:
        return {}
    own = reading.total_ms - sum(reading.ms.get(name, 0.0) for name in NOT_OWN)
    shared = torch.zeros(len(PHASES) + comm.world_size, dtype=torch.float64)
    shared[: len(PHASES)] = torch.tensor([reading.ms.get(name, 0.0) for name in PHASES])
    shared[len(PHASES) + comm.rank] = own
    sums = (comm.all_sum(shared) / reading.steps).tolist()
    mean_ms = {name: total / comm.world_size for name, total in zip(PHASES, sums, strict=False) if total}
    return {f"phase/{name}_ms": ms for name, ms in mean_ms.items()} | straggler(
        sums[len(PHASES) :], sum(mean_ms.values())
    )


def straggler(own_ms: list[float], step_ms: float) -> dict[str, float]:
    """Return the rank with the most own time, and its excess over the median rank as a fraction of the step.

    own_ms [80, 100], step_ms 110 -> rank 1, excess (100 - 80) / 110; of two ranks the faster one is the median.
    """
    slowest = max(range(len(own_ms)), key=own_ms.__getitem__)
    excess = own_ms[slowest] - statistics.median_low(own_ms)
    return {"straggler/rank": float(slowest), "straggler/excess_share": excess / step_ms}


def _time_forward(phases: PhaseTimer, phase: str, child: nn.Module) -> None:
    def enter(*_: Any) -> None:
        phases.begin(phase)

    def leave(*_: Any) -> None:
        phases.end()

    child.register_forward_pre_hook(enter)
    child.register_forward_hook(leave, always_call=True)
