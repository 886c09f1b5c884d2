"""Resume a run: where it stands in its data, which checkpoint it goes on from, and roll-backs in the same processes.

    cursor, messages = resume_newest(task, allowed_changes)       # --resume
    cursor = restore(task, path)                                  # DataCursor(step=100, skipped_steps=0)
    cursor = rollbacks.go_back(task, cursor, request, log)        # seen at 120: DataCursor(step=100, skipped_steps=20)

Step s takes the batch of position s + skipped_steps of the data. A roll-back leaves out all data since its checkpoint:
the bad batches, and those that led there. Schedules follow the step. Where the run stops before its next checkpoint, a
resume meets the same trouble and rolls back again.

Checkpoints hold the position in the data in samples, not in steps: a run that is resumed with another batch size starts
at the next sample that no step has taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from configs import RunConfig, UserError, fingerprint, load_run
from data.order import chain_digest
from engine import distributed
from engine.checkpoint import reading
from engine.checkpoint.contents import load_checkpoint, newest_good
from engine.checkpoint.directory import resume_candidates
from engine.distributed import on_first_rank
from engine.health.anomalies import RollbackRequested, TrainingFailed
from engine.run_directory import checkpoint_directory
from engine.tasks.task import TrainingTask

DATA_KEYS = ("data", "latents", "seed")  # --allow-change of one of them permits other samples


@dataclass(frozen=True)
class DataCursor:
    """Where a run stands in its data."""

    step: int = 0  # finished
    skipped_steps: int = 0  # steps of data that roll-backs left out
    samples_digest: str = ""  # of all samples that made the weights (data/order.py)
    offset: int = 0  # position of step 0 with none skipped; not 0 after a resume with another batch size

    def position(self, done: int, config: RunConfig) -> int:
        """Return the position in the data, in samples, of the first sample of the step after `done`."""
        return self.offset + (done + self.skipped_steps) * config.samples_per_step


class SampleDigest:
    """Digest of all samples that made the weights; goes on from `digest`, the same at any world size."""

    def __init__(self, digest: str) -> None:
        self._digest, self._sums = digest, list[int]()

    def add(self, own_sum: int) -> None:
        """Add one step by the hash of this rank's samples (DataSource.sample_hash): integers of the host."""
        self._sums.append(own_sum)

    def read(self) -> str:
        """Return the digest of all steps so far, the same on every rank. A collective."""
        of_ranks = distributed.gather_objects(self._sums)
        self._digest, self._sums = chain_digest(self._digest, map(sum, zip(*of_ranks, strict=True))), []
        return self._digest


def resume_newest(task: TrainingTask, allowed_changes: tuple[str, ...]) -> tuple[DataCursor, list[str]]:
    """Restore the newest intact checkpoint; return the cursor, and log lines on checkpoints passed over and batch size.

    A collective. Raises UserError where there is none, or the corpus is another one.
    """
    messages: list[str] = []
    config = task.setup.config
    path = newest_good(checkpoint_directory(config), messages.append)
    check_corpus(task, path, allowed_changes)
    if message := batch_change_message(path, config):
        messages.append(message)
    return restore(task, path), messages


def restore(task: TrainingTask, path: Path) -> DataCursor:
    """Load a checkpoint into the task; return the cursor to go on from. A collective."""
    load_checkpoint(path, task.train_state())
    return resume_cursor(path, task.setup.config)


def resume_cursor(path: Path, config: RunConfig) -> DataCursor:
    """Return the cursor of a resume: it starts at the first sample not yet taken, also with another batch size.

    With another data.streams it starts at the next position that is a multiple of it.
    """
    state = reading.read_state(path)
    position = -(-_next_position(path, config) // config.streams) * config.streams
    offset = position - (state.step + state.skipped_steps) * config.samples_per_step
    return DataCursor(state.step, state.skipped_steps, state.samples_digest, offset)


def batch_change_message(path: Path, config: RunConfig) -> str:
    """Return a log line for a resume with another batch size or data.streams; "" where the position is unaffected."""
    if reading.read_state(path).fingerprint == fingerprint(config):
        return ""
    before, now = load_run(path / "config.yaml").samples_per_step, config.samples_per_step
    cursor = resume_cursor(path, config)
    expected, start = _next_position(path, config), cursor.position(cursor.step, config)
    if before == now and start == expected:
        return ""
    skipped = f"{start - expected} before it are skipped (a step starts at a multiple of data.streams={config.streams})"
    return (
        f"batch size {before} in the checkpoint, {now} in this run: the run resumes at sample {start:,} of the data, "
        f"{skipped if start > expected else 'none is skipped or repeated'}"
    )


def check_corpus(task: TrainingTask, path: Path, allowed: tuple[str, ...]) -> None:
    """Raise UserError where the resumed run would go on with other samples than the checkpoint's would have."""
    state = reading.read_state(path)
    now = task.data.order_facts(_next_position(path, task.setup.config))
    changes = [f"{name}: {was} -> {now.get(name)}" for name, was in state.corpus.items() if now.get(name) != was]
    if changes and not any(key in DATA_KEYS or key.split(".")[0] in DATA_KEYS for key in allowed):
        raise UserError(
            f"--resume: the corpus is not the one that {path} was trained on ({'; '.join(changes)}): samples would be "
            "met twice, or never; restore it, start a new run, or say --allow-change data"
        )


def _next_position(path: Path, config: RunConfig) -> int:
    """Return the number of samples that the steps before a checkpoint have taken or skipped."""
    state = reading.read_state(path)
    if state.position is not None:
        return state.position
    saved_config = config if state.fingerprint == fingerprint(config) else load_run(path / "config.yaml")
    return (state.step + state.skipped_steps) * saved_config.samples_per_step


class Rollbacks:
    """Roll-backs of one run: at most `most_in_a_row` to one checkpoint (health.most_rollbacks)."""

    def __init__(self, most_in_a_row: int) -> None:
        self._most, self._count, self._last_step = most_in_a_row, 0, -1

    def go_back(
        self, task: TrainingTask, begun: DataCursor, request: RollbackRequested, log: Callable[[str], None]
    ) -> DataCursor:
        """Restore the newest intact checkpoint; return the cursor behind the data of all steps since then.

        `begun` is the cursor that those steps began at. A collective, with no save under way. Raises TrainingFailed
        where there is no checkpoint, or where the run went back to it too often.
        """
        root, counts = checkpoint_directory(task.setup.config), request.counts
        if not on_first_rank(lambda: resume_candidates(root)):
            raise TrainingFailed(
                request.kind,
                f"{counts}, before the first checkpoint: there is nothing to go back to; save earlier "
                "(system.checkpoint.every), lower optim.lr, or set health to skip",
            )
        path = newest_good(root, log)
        step = reading.read_state(path).step
        self._count = self._count + 1 if step == self._last_step else 1
        if self._count > self._most:
            raise TrainingFailed(
                request.kind,
                f"{counts}, after {self._most} roll-backs to step {step} (health.most_rollbacks): other data does not "
                "help; resume from an earlier checkpoint, or with a lower optim.lr",
            )
        self._last_step = step
        restored = restore(task, path)
        skipped_steps = begun.skipped_steps + counts.step - restored.step
        return replace(restored, skipped_steps=skipped_steps, offset=begun.offset)
