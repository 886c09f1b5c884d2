"""Save checkpoints while the training goes on.

    saver = Saver(root, config)
    saver.save(300, task.train_state())     # the steps wait for a copy in memory; a thread writes it
    saver.results()                         # at reports: what has been saved, or could not be
    saver.finish()                          # at the end: all is on disk, or CheckpointError

A failed save does not end a run: the last good checkpoint stays, the log says what is wrong, and the next save tries
again. Only `finish` raises.

In a save (`BackgroundSave`) a thread of every rank writes the rank's file, and that of rank 0 commits them all. These
threads tell each other through the directory alone (a checksum of every file that is on disk), since a collective
beside those of the training would have to come in the same order on all ranks.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs import RunConfig, UserError, to_yaml
from configs.run import Checkpoint
from data.durable_files import write_atomic
from engine import distributed
from engine.checkpoint import contents, directory
from engine.checkpoint.contents import NO_PROGRESS, DataProgress, TrainState
from engine.checkpoint.directory import checksum_line, commit_draft, remove_old_checkpoints
from engine.checkpoint.tensor_ranges import HostCopies, TensorRange, write_ranges
from engine.distributed import error_of_first_rank
from engine.health.anomalies import TrainingFailed

RUNNING, DONE = "running", "done"
POLL_SECONDS = 0.02  # between two looks for the checksums of the other ranks


class CheckpointError(TrainingFailed):
    """A checkpoint could not be written; the one before it is still on disk."""

    def __init__(self, message: str) -> None:
        super().__init__("checkpoint", message)


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: a line for the log, and scalars."""

    message: str
    scalars: dict[str, float]
    is_good: bool


class Saver:
    """Save the checkpoints in `root`, on every rank. Methods but `close` are collectives."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._root, self._config = root, config
        self._copies = HostCopies()
        self._current: BackgroundSave | None = None
        self._results: list[SaveResult] = []
        self._step, self._stall = 0, 0.0  # of the current save: steps finished, seconds that the training waited

    def save(self, step: int, state: TrainState, progress: DataProgress = NO_PROGRESS) -> None:
        """Begin to save the state after `step` steps; wait for a save under way to end first.

        The training waits for a copy in host memory; with system.checkpoint.background=false, for the disk.
        """
        began = time.monotonic()
        self._settle(wait=True)
        draft, settings = directory.draft_path(self._root, step), self._config.system.checkpoint
        if error := error_of_first_rank(lambda: self._make_draft(draft)):
            self._results.append(self._failure(step, error))
            return
        ranges = contents.ranges_of(state)
        content = contents.checkpoint_state(step, state, self._config, progress)
        texts = {"state.json": json.dumps(asdict(content)), "config.yaml": to_yaml(self._config)}
        copies = self._copies.take(ranges) if settings.background else ranges
        rank, world_size = distributed.rank(), distributed.world_size()
        self._current = BackgroundSave(draft, rank, world_size, copies, texts, settings)
        self._step = step
        if settings.background:
            self._current.start()
        else:
            self._current.run()
        self._stall = time.monotonic() - began

    def results(self) -> list[SaveResult]:
        """Return how saves ended since the last call. Does not wait for the disk."""
        self._settle(wait=False)
        results, self._results = self._results, []
        return results

    def settle(self) -> list[SaveResult]:
        """Wait for the save under way to end; return the results."""
        self._settle(wait=True)
        return self.results()

    def finish(self) -> list[SaveResult]:
        """Wait as `settle` does. Raises CheckpointError, on all ranks, where the last save failed."""
        results = self.settle()
        if results and not results[-1].is_good:
            raise CheckpointError(results[-1].message)
        return results

    def close(self) -> None:
        """Give up a save under way."""
        if self._current is not None:
            self._current.cancel()

    def _make_draft(self, draft: Path) -> None:
        directory.clear_drafts(self._root)
        draft.mkdir(parents=True)

    def _settle(self, wait: bool) -> None:
        """Append the result that all ranks agree on; nothing where there is no save, or it is still under way."""
        if (save := self._current) is None:
            return
        if wait:
            save.wait_for_file()
        statuses = distributed.gather_objects(save.status)
        error = _first_error(statuses)
        if error:
            save.cancel()
        if wait or (error and all(each.file != RUNNING for each in statuses)):
            save.join()
            statuses = distributed.gather_objects(save.status)
        if RUNNING in (statuses[0].checkpoint, *(each.file for each in statuses)):
            return
        self._current = None
        error = error or _first_error(statuses)
        self._results.append(self._failure(self._step, error) if error else self._success(statuses))

    def _success(self, statuses: list[SaveStatus]) -> SaveResult:
        size, seconds = sum(each.num_bytes for each in statuses), statuses[0].seconds
        message = (
            f"saved {self._root / directory.checkpoint_name(self._step)}: {size / 2**20:.1f} MiB in {seconds:.1f} s"
        )
        message += f", of which the steps waited {1e3 * self._stall:.0f} ms"
        message += "".join(f"; {note}" for note in statuses[0].notes)
        scalars = {"stall_ms": 1e3 * self._stall, "seconds": seconds, "mib": size / 2**20, "failed": 0.0}
        return SaveResult(message, {f"checkpoint/{name}": value for name, value in scalars.items()}, is_good=True)

    def _failure(self, step: int, error: str) -> SaveResult:
        error_of_first_rank(lambda: directory.clear_drafts(self._root))  # a full disk needs the room
        try:
            good = directory.resume_candidates(self._root)[:1]
        except (OSError, UserError):
            last = "the checkpoints before it cannot be seen now"
        else:
            last = f"the last good checkpoint is {good[0].name}" if good else "there is no checkpoint yet"
        message = f"could not save {directory.checkpoint_name(step)}: {error}; {last}"
        return SaveResult(message, {"checkpoint/failed": 1.0}, is_good=False)


def save(root: Path, step: int, state: TrainState, config: RunConfig) -> Path:
    """Save one checkpoint and wait until it is on disk. A collective. Raises CheckpointError."""
    saver = Saver(root, config)
    saver.save(step, state)
    saver.finish()
    return root / directory.checkpoint_name(step)


@dataclass(frozen=True)
class SaveStatus:
    """How far a rank's save is: RUNNING, DONE, or the error."""

    file: str = RUNNING  # this rank's file
    checkpoint: str = RUNNING  # on rank 0, the whole checkpoint
    num_bytes: int = 0
    seconds: float = 0.0  # until `checkpoint` was known
    notes: tuple[str, ...] = ()


def _first_error(statuses: list[SaveStatus]) -> str:
    """Return the first error with its rank, that of a file first: rank 0 gives up because of another. "" without."""
    found = [*enumerate(each.file for each in statuses), *enumerate(each.checkpoint for each in statuses)]
    return next((f"rank {rank}: {status}" for rank, status in found if status not in (RUNNING, DONE)), "")


class BackgroundSave:
    """One save of one rank, in a thread (`start`) or at once (`run`). Raises nothing: `status` has the error."""

    def __init__(
        self,
        draft: Path,
        rank: int,
        world_size: int,
        ranges: list[TensorRange],
        texts: Mapping[str, str],
        settings: Checkpoint,
    ) -> None:
        self._draft, self._rank, self._world_size = draft, rank, world_size
        self._ranges, self._texts, self._settings = ranges, texts, settings
        self._is_cancelled, self._file_has_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self.run, name=f"save {draft.name}", daemon=True)
        self._began = time.monotonic()
        self.status = SaveStatus()

    def start(self) -> None:
        """Begin `run` in a thread, which does not keep the process from ending."""
        self._thread.start()

    def run(self) -> None:
        """Write this rank's file; on rank 0, commit the checkpoint. An error ends up in `status`, not in the thread."""
        try:
            self._save_file()
        finally:
            self._file_has_ended.set()
        if self._rank == 0 and self.status.file == DONE:
            self._save_checkpoint()

    def cancel(self) -> None:
        """On rank 0: wait no longer for the files of others."""
        self._is_cancelled.set()

    def wait_for_file(self) -> None:
        """Return when this rank's file is written or has failed: `status.file` says which."""
        self._file_has_ended.wait()

    def join(self) -> None:
        """Return when the thread has ended; at once where there is none, after `run`."""
        if self._thread.is_alive():
            self._thread.join()

    def _set_status(self, **changes: Any) -> None:
        """Replace `status` in one assignment, so that another thread never sees half of it."""
        self.status = replace(self.status, seconds=time.monotonic() - self._began, **changes)

    def _save_file(self) -> None:
        try:
            num_bytes = self._write_file()
        except Exception as error:
            self._set_status(file=_error_text(error), checkpoint=_error_text(error))
        else:
            self._set_status(file=DONE, checkpoint=DONE if self._rank else RUNNING, num_bytes=num_bytes)

    def _save_checkpoint(self) -> None:
        try:
            self._commit()
        except Exception as error:
            self._set_status(checkpoint=_error_text(error))
        else:
            self._set_status(checkpoint=DONE, notes=self._remove_old())

    def _write_file(self) -> int:
        path = self._draft / f"rank-{self._rank:05d}.safetensors"
        write_ranges(path, self._ranges)
        write_atomic(_sum_file(self._draft, self._rank), checksum_line(path))
        return path.stat().st_size

    def _commit(self) -> None:
        for name, text in self._texts.items():
            write_atomic(self._draft / name, text)
        expected = [_sum_file(self._draft, rank) for rank in range(self._world_size)]
        while missing := [path for path in expected if not path.exists()]:
            if self._is_cancelled.wait(POLL_SECONDS):
                raise OSError(f"given up while {len(missing)} of {self._world_size} files were missing")
        sums = [path.read_text() for path in expected] + [checksum_line(self._draft / name) for name in self._texts]
        for path in expected:
            path.unlink()
        commit_draft(self._draft, sums)

    def _remove_old(self) -> tuple[str, ...]:
        """Remove what is too old; a file system that refuses is no reason to lose the new checkpoint."""
        try:
            removed = remove_old_checkpoints(self._draft.parent, self._settings.keep_last, self._settings.keep_every)
        except (OSError, UserError) as error:
            return (f"could not remove an older one: {error}",)
        return tuple(f"removed {path.name}" for path in removed)


def _sum_file(draft: Path, rank: int) -> Path:
    return draft / f".rank-{rank:05d}.sum"


def _error_text(error: Exception) -> str:
    return str(error) or type(error).__name__
