"""What a kind of run brings to the engine's one loop (engine/run.py), which knows nothing else of it.

    training = engine.trainings.kinds.assemble(config, ds_config, comm, run_dir, resume)
    for batch in training.batches(first_step=0):
        record = training.step(batch)

Pre-training a tokenizer is engine/trainings/pretraining.py. Batches, losses and pictures differ from kind to kind;
reports, checkpoints, instruments, stopping and resuming are the same code for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from configs import RunConfig
from data.durable_files import AppendOnlyFile
from engine.checkpoint.pieces import Piece, Pieces
from engine.health.judge import Judge
from model.losses.comm import Comm
from profiling.cost.flops import StepFlops
from profiling.instruments.phases import PhaseTimer

N = TypeVar("N", bound="Numbered")


class Record(Protocol):
    """What one step leaves behind on this rank, for the meter and the guard."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Every named term, detached scalars on the device: this rank's mean. "total" is guarded."""
        ...

    @property
    def schedule(self) -> dict[str, float]:
        """Learning rate and the like of this step."""
        ...

    @property
    def grad_norm(self) -> float | Tensor:
        """Of the averaged gradient before clipping; the same on every rank."""
        ...

    @property
    def counted(self) -> dict[str, float]:
        """What the host knows without asking the device, by the report's names; reported as means."""
        ...


class Follower(Protocol):
    """What of a run evolves beside its engines: a running average of parameters, a window of norms."""

    def pieces(self) -> list[Piece]:
        """This rank's share, to be written."""
        ...

    def restore(self, pieces: Pieces) -> None:
        """This rank's share, from a checkpoint."""
        ...

    def replicas(self) -> list[tuple[str, Tensor]]:
        """What every rank holds whole, and alike."""
        ...

    def copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, values, fp32 master): what of this rank is the rounding of something else."""
        ...


@dataclass(frozen=True)
class Kept:
    """All that evolves by itself, and hence all that a checkpoint holds; the rest is a function of the step."""

    engines: Mapping[str, Any]  # DeepSpeed's, by name; MAIN is one of them
    followers: Sequence[Follower] = ()
    whole: Mapping[str, Tensor] = field(default_factory=dict)  # small, and the same on every rank


class Numbered(Protocol):
    """A dataclass with a `step`."""

    @property
    def step(self) -> int:
        """Counted from 0: place in the data, or once `renumbered` the step that takes it."""
        ...


def renumbered(batches: Iterator[N], skipped_steps: int) -> Iterator[N]:
    """The batches, each numbered by the step that takes it: schedules follow the step, samples their place."""
    return (replace(batch, step=batch.step - skipped_steps) for batch in batches)  # type: ignore[type-var]


class Training(Protocol):
    """One kind of run, assembled on this rank. Methods are called on all ranks alike: each may be a collective."""

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        ...

    @property
    def comm(self) -> Comm:
        """The ranks of the run."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        ...

    @property
    def phases(self) -> PhaseTimer:
        """The recorder of where this rank's time goes."""
        ...

    @property
    def choices(self) -> dict[str, str]:
        """What every "auto" became, and why."""
        ...

    @property
    def backend(self) -> str:
        """Of attention, resolved."""
        ...

    def describe(self) -> str:
        """What is trained, for a person."""
        ...

    @property
    def judges(self) -> Sequence[Judge]:
        """Of each engine's steps."""
        ...

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[Any]:
        """Iterate over this rank's batches from `first_step` on, without end; an iteration before this one ends.

        A batch's `step` is the step that takes it; its samples start at position
        offset + (step + skipped_steps) * samples_per_step of the data.
        """
        ...

    def samples(self, batch: Any) -> int:
        """This rank's samples in a batch as a sum of hashes modulo 2^64 (data/order.py)."""
        ...

    def corpus(self, position: int) -> dict[str, str]:
        """Return facts, by name, that identify the corpus and the samples from that position in the data on."""
        ...

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """Files beside the log that this rank's data writes to."""
        ...

    def step(self, batch: Any) -> Record:
        """One optimizer step."""
        ...

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """Of one step of this rank, whose records had such means of `counted`; none: before any step."""
        ...

    def wait_seconds(self) -> float:
        """What this rank waited for batches since this was last asked."""
        ...

    def health(self) -> dict[str, float]:
        """What a report says beside losses and speed."""
        ...

    def pictures(self) -> dict[str, Tensor]:
        """(3, height, width) in [0, 1] by name, of the last step; read on the first rank."""
        ...

    def kept(self) -> Kept:
        """What a checkpoint saves and restores."""
        ...

    def restored(self, whole: Mapping[str, Tensor]) -> None:
        """Engines and followers have been restored; `whole` is what Kept.whole was."""
        ...

    def close(self) -> None:
        """Ends threads."""
        ...
