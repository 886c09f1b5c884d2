"""The state of a run that a checkpoint holds: collect it, restore it, and find the checkpoint to resume from.

    ranges = ranges_of(task.train_state())                      # this rank's part: views, the next step changes them
    state = checkpoint_state(300, task.train_state(), config)   # state.json
    path = newest_good(root, log=reporter.message)              # `latest`, or the one before it where it is damaged
    state = load_checkpoint(path, task.train_state())           # at any world size, under any ZeRO stage

`TrainState` is the one registry of what evolves: fp32 weights and AdamW moments of every engine, fp32 running averages,
small tensors that all ranks share. Everything else is a function of the step (views, masks, noise, schedules; models
draw no random numbers), so `state.json` needs little more than the step and the position in the data. Loading at
another world size or ZeRO stage is the same code: each rank reads the ranges it now owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from configs import RunConfig, UserError, fingerprint
from engine import distributed, zero
from engine.checkpoint import directory
from engine.checkpoint.reading import CheckpointState, read_state
from engine.checkpoint.tensor_ranges import MAIN, MASTER, MOMENTS, WHOLE, RangeReader, TensorRange, qualified_name
from engine.distributed import on_first_rank, raise_on_all_ranks
from engine.initial_weights import model_part


class Stateful(Protocol):
    """State of a run beside its engines: a running average of weights, a window of gradient norms, a centre."""

    def state_ranges(self) -> list[TensorRange]:
        """Return this rank's part of the state, to be saved."""
        ...

    def load_ranges(self, reader: RangeReader) -> None:
        """Load this rank's part of the state from a checkpoint."""
        ...

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """List (name, tensor) of what every rank holds whole and with equal values."""
        ...

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """List (name, values, fp32 master) of what is the rounding of something else on this rank."""
        ...


@dataclass(frozen=True)
class TrainState:
    """State to checkpoint; everything else follows from the step number."""

    engines: Mapping[str, Any]  # DeepSpeed's, by name; MAIN is one of them
    stateful: Sequence[Stateful] = ()


def replicated_ranges(tensors: Mapping[str, Tensor]) -> list[TensorRange]:
    """Return ranges of small tensors that all ranks hold alike: whole on the first rank, none on others."""
    return [TensorRange(WHOLE, name, 0, tensor.flatten()) for name, tensor in tensors.items() if distributed.is_first()]


def ranges_of(state: TrainState) -> list[TensorRange]:
    """Return this rank's part of the run's state, as it is now."""
    ranges = []
    for name, engine in state.engines.items():
        keys = (MASTER, *MOMENTS) if zero.steps_taken(engine) else (MASTER,)
        ranges += [
            TensorRange(key, qualified_name(name, fragment.name), fragment.start, fragment.read(key))
            for fragment in zero.fragments(engine)
            for key in keys
        ]
    for each in state.stateful:
        ranges += each.state_ranges()
    return ranges


@dataclass(frozen=True)
class DataProgress:
    """What a run has consumed of its data; the fields are those of CheckpointState."""

    skipped_steps: int = 0
    samples_digest: str = ""
    corpus: dict[str, str] = field(default_factory=dict)
    position: int | None = None


NO_PROGRESS = DataProgress()


def checkpoint_state(
    step: int, state: TrainState, config: RunConfig, progress: DataProgress = NO_PROGRESS
) -> CheckpointState:
    """Return the content of state.json after `step` finished steps."""
    trainable = (item for item in state.engines[MAIN].module.named_parameters() if item[1].requires_grad)
    shapes = {name: list(zero.full_shape(parameter)) for name, parameter in trainable}
    steps = {name: zero.steps_taken(engine) for name, engine in state.engines.items()}
    return CheckpointState(step, steps, distributed.world_size(), fingerprint(config), shapes, **asdict(progress))


def load_checkpoint(path: Path, state: TrainState) -> CheckpointState:
    """Restore this rank's shards of engines and of everything stateful; return the content of state.json.

    Raises UserError, on every rank and before anything is restored, where the weights are another model's.
    """
    saved, reader = read_state(path), RangeReader(path)
    check_shapes(path, saved, state, reader)
    for name, engine in state.engines.items():
        _restore_engine(name, engine, saved.optimizer_steps.get(name, 0), reader)
    for each in state.stateful:
        each.load_ranges(reader)
    return saved


def check_shapes(path: Path, saved: CheckpointState, state: TrainState, reader: RangeReader) -> None:
    """Compare the shape of every trained parameter with the checkpoint's; raise UserError at the first difference.

    Without this check a range of a larger tensor would be read into a smaller one without an error. The checkpoint may
    hold more parameters only of a part that this run's model lacks, because an objective was switched off.
    """
    numels = {name: reader.numel(MASTER, name) for name in reader.names(MASTER)}
    own: dict[str, tuple[int, ...]] = {}
    for engine_name, engine in state.engines.items():
        trained = (item for item in engine.module.named_parameters() if item[1].requires_grad)
        own |= {qualified_name(engine_name, name): tuple(zero.full_shape(parameter)) for name, parameter in trained}
    parts = {model_part(name) for name in own}
    for name in dict.fromkeys((*own, *saved.shapes)):
        shape, saved_shape = own.get(name), tuple(saved.shapes[name]) if name in saved.shapes else None
        if shape is None and model_part(name) not in parts:
            continue
        # state.json has no shapes of engines beside the main one: their sizes are compared.
        if saved_shape == shape or (saved_shape is None and numels.get(name) == math.prod(shape or ())):
            continue
        raise UserError(
            f"--resume: {name} is {saved_shape or numels.get(name, 'not')} in {path} and {shape or 'not there'} in "
            "this run: these are another model's weights; restore the settings in its config.yaml, or start a new run "
            "under another name"
        )


def _restore_engine(name: str, engine: Any, steps: int, reader: RangeReader) -> None:
    zero.make_moments(engine, steps)
    for fragment in zero.fragments(engine):
        for key in (MASTER, *MOMENTS) if steps else (MASTER,):
            fragment.write(key, reader.read(key, qualified_name(name, fragment.name), fragment.start, fragment.numel))
    zero.sync_from_masters(engine)


def newest_good(root: Path, log: Callable[[str], None]) -> Path:
    """Return the checkpoint that `latest` names or, where that is damaged, the newest intact one before it.

    A collective: each rank checks its part of the files against SHA256SUMS. `log` gets a line for every checkpoint
    passed over. Raises UserError where none is intact.
    """
    candidates, latest = on_first_rank(lambda: (directory.resume_candidates(root), directory.read_latest(root)))
    problems = (
        [] if latest is None or latest in candidates else [f"{latest} is not complete (it has no {directory.SUMS})"]
    )
    for problem in problems:
        log(f"passed over: {problem}")
    for path in candidates:
        if not (problem := _damage(path)):
            return path
        problems.append(problem)
        log(f"passed over: {problem}")
    raise UserError(
        f"--resume: {root} has no checkpoint that can be trusted ({'; '.join(problems) or 'none is complete'}): bring "
        "one back from a copy, or start anew under another name"
    )


def _damage(path: Path) -> str:
    """Return the first rank's reason why a checkpoint cannot be used; "" where it can. A collective."""
    try:
        raise_on_all_ranks(lambda: _check_rank_part(path))
    except UserError as error:
        return str(error)
    return ""


def _check_rank_part(path: Path) -> None:
    names = sorted(directory.read_checksums(path))
    directory.check_checksums(path, names[distributed.rank() :: distributed.world_size()])
