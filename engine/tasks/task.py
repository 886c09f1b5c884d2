"""What a kind of training gives to the training loop (engine/trainer.py): its data, its step, its state.

    task = engine.trainer.build_task(config, ds_config, comm, run_dir, is_resumed=False)
    for batch in task.data.batches(first_step=0):
        result = task.step(batch)

Pre-training is engine/tasks/pretrain.py. Batches, losses and images differ from kind to kind; reports, checkpoints,
instruments, stopping and resuming are the same code for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from configs import RunConfig
from data.durable_files import AppendOnlyFile
from engine.checkpoint.contents import TrainState
from engine.health.anomalies import GradNormGuard
from model.losses.comm import Comm
from profiling.cost.flops import StepFlops
from profiling.instruments.phases import PhaseTimer


@dataclass(frozen=True)
class StepResult:
    """What one step of any task leaves on this rank, for the meter and the checks of health."""

    losses: dict[str, Tensor]  # every named term, detached scalars on the device: this rank's mean; "total" is checked
    schedule: dict[str, float]  # learning rate and the like of this step
    grad_norm: float | Tensor  # of the averaged gradient before clipping; the same on every rank
    counted: dict[str, float]  # known on the host without asking the device, by scalar name; reported as means


@dataclass(frozen=True)
class TaskSetup:
    """How a task was built on this rank."""

    config: RunConfig
    comm: Comm  # the ranks of the run
    device: torch.device
    phases: PhaseTimer  # recorder of where this rank's time goes
    choices: dict[str, str]  # what every "auto" became, and why
    attention: str  # name of the attention backend, resolved
    guards: Sequence[GradNormGuard]  # one for each engine's optimizer steps


class DataSource(Protocol):
    """The batches of a task, and what is known of the samples in them."""

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[Any]:
        """Iterate over this rank's batches from `first_step` on, without end; an iteration before this one ends.

        A batch's `step` is the step that takes it; its samples start at position
        offset + (step + skipped_steps) * samples_per_step of the data.
        """
        ...

    def sample_hash(self, batch: Any) -> int:
        """Sum of the hashes of this rank's samples in a batch, modulo 2^64 (data/order.py)."""
        ...

    def order_facts(self, position: int) -> dict[str, str]:
        """Return facts, by name, that identify the corpus and the samples from that position in the data on."""
        ...

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """Files beside the log that this rank's data writes to."""
        ...

    def wait_seconds(self) -> float:
        """Return the seconds that this rank waited for batches since the last call."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return scalars on the data for a report, such as bad samples. A collective."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class TrainingTask(Protocol):
    """One kind of training, built on this rank. Methods are called on all ranks alike: each may be a collective."""

    setup: TaskSetup

    @property
    def data(self) -> DataSource:
        """The task's batches."""
        ...

    def describe(self) -> str:
        """Describe the data and the model for a person."""
        ...

    def step(self, batch: Any) -> StepResult:
        """Take one optimizer step."""
        ...

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """FLOPs of one step of this rank whose results had these means of `counted`; {} before any step."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return scalars for a report beside losses and speed."""
        ...

    def images(self) -> dict[str, Tensor]:
        """Return (3, height, width) images in [0, 1] of the last step, by name; the first rank's are shown."""
        ...

    def train_state(self) -> TrainState:
        """Return what a checkpoint saves and restores."""
        ...


class NumberedBatch(Protocol):
    """A dataclass with a `step`."""

    @property
    def step(self) -> int:
        """Counted from 0: index in the data or, after `number_by_step`, the step that takes the batch."""
        ...


NumberedT = TypeVar("NumberedT", bound=NumberedBatch)


def number_by_step(batches: Iterator[NumberedT], skipped_steps: int) -> Iterator[NumberedT]:
    """Number each batch by the step that takes it: schedules follow the step, samples their position in the data."""
    return (replace(batch, step=batch.step - skipped_steps) for batch in batches)  # type: ignore[type-var]
