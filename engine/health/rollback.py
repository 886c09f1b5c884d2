"""Back to the last checkpoint in the same processes, and on with other data.

    cursor = restored(training, path)                  # Cursor(step=100, skipped_steps=0): a resumed run does this too
    cursor = rollbacks.go_back(training, cursor, trouble, say)         # seen at 120: Cursor(step=100, skipped_steps=20)

The batch of step s is that of place s + skipped_steps in the data, so all that came since the checkpoint is left out:
the bad batches, and those that led there. Schedules follow the step. Where the run stops before its next checkpoint, a
resume meets the same trouble and takes the same way back.

Checkpoints hold the position in the data in samples, not in steps: a run that is resumed with another batch size starts
at the next sample that no step has taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from configs import RunConfig, UserError, fingerprint, load_run
from engine import archive
from engine.agreement import on_first
from engine.checkpoint.contents import load
from engine.checkpoint.directory import candidates
from engine.checkpoint.verified import newest_good
from engine.health.failure import TrainingFailed
from engine.health.guard import GoBack
from engine.places import checkpoints
from engine.training import Training

DATA_KEYS = ("data", "latents", "seed")  # --allow-change of one of them permits other samples


@dataclass(frozen=True)
class Cursor:
    """Where a run stands."""

    step: int = 0  # finished
    skipped_steps: int = 0  # whose data was left out
    samples_digest: str = ""  # of what made the weights (data/order.py)
    offset: int = 0  # position of step 0 with none skipped; not 0 after a resume with another batch size

    def position(self, done: int, config: RunConfig) -> int:
        """Return the position in the data, in samples, of the first sample of the step after `done`."""
        return self.offset + (done + self.skipped_steps) * config.samples_per_step


def resume_cursor(path: Path, config: RunConfig) -> Cursor:
    """Return the cursor of a resume: it starts at the first sample not yet taken, also with another batch size.

    With another data.streams it starts at the next position that is a multiple of it.
    """
    state = archive.read_state(path)
    position = -(-_next_position(path, config) // config.streams) * config.streams
    offset = position - (state.step + state.skipped_steps) * config.samples_per_step
    return Cursor(state.step, state.skipped_steps, state.samples_digest, offset)


def batch_change_message(path: Path, config: RunConfig) -> str:
    """Return a log line for a resume with another batch size or data.streams; "" where the position is unaffected."""
    if archive.read_state(path).fingerprint == fingerprint(config):
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


def restored(training: Training, path: Path) -> Cursor:
    """Load a checkpoint into the training; return the cursor to resume at. A collective."""
    _, whole = load(path, training.kept())
    training.restored(whole)
    return resume_cursor(path, training.config)


def check_corpus(training: Training, path: Path, allowed: tuple[str, ...]) -> None:
    """Raises UserError where the resumed run would go on with other samples than the checkpoint's would have."""
    state = archive.read_state(path)
    now = training.corpus(_next_position(path, training.config))
    changes = [f"{name}: {was} -> {now.get(name)}" for name, was in state.corpus.items() if now.get(name) != was]
    if changes and not any(key in DATA_KEYS or key.split(".")[0] in DATA_KEYS for key in allowed):
        raise UserError(
            f"--resume: the corpus is not the one that {path} was trained on ({'; '.join(changes)}): samples would be "
            "met twice, or never; restore it, start a new run, or say --allow-change data"
        )


def _next_position(path: Path, config: RunConfig) -> int:
    """Return the number of samples that the steps before a checkpoint have taken or skipped."""
    state = archive.read_state(path)
    if state.position is not None:
        return state.position
    saved_config = config if state.fingerprint == fingerprint(config) else load_run(path / "config.yaml")
    return (state.step + state.skipped_steps) * saved_config.samples_per_step


class Rollbacks:
    """Of one run: at most `most` in a row to one checkpoint."""

    def __init__(self, most: int) -> None:
        self._most, self._count, self._last = most, 0, -1

    def go_back(self, training: Training, begun: Cursor, trouble: GoBack, say: Callable[[str], None]) -> Cursor:
        """Restores the newest good checkpoint for steps that began at `begun`. A collective, with no save under way;
        raises TrainingFailed where there is none, or where it was gone back to too often."""
        root, found = checkpoints(training.config), trouble.found
        if not on_first(lambda: candidates(root)):
            raise TrainingFailed(
                trouble.kind,
                f"{found}, before the first checkpoint: there is nothing to go back to; save earlier "
                "(system.checkpoint.every), lower optim.lr, or set health to skip",
            )
        path = newest_good(root, say)
        step = archive.read_state(path).step
        self._count = self._count + 1 if step == self._last else 1
        if self._count > self._most:
            raise TrainingFailed(
                trouble.kind,
                f"{found}, after {self._most} roll-backs to step {step} (health.most_rollbacks): other data does not "
                "help; resume from an earlier checkpoint, or with a lower optim.lr",
            )
        self._last = step
        at = restored(training, path)
        return replace(at, skipped_steps=begun.skipped_steps + found.step - at.step, offset=begun.offset)
