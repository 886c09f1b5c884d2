"""One save on its way to disk: a thread of every rank writes the rank's file, that of rank 0 commits them all.

    writing = Writing(draft, rank=0, world_size=8, pieces=held, beside={"state.json": text})
    writing.start()
    writing.told                        # Told(share="done", outcome="running", ...)
    writing.cancel()                    # rank 0: do not wait for the others any more

Ranks speak to each other through the directory alone (a sum of every file that is on disk), since a collective beside
those of the training would have to come in the same order on all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs import UserError
from configs.run import Checkpoint
from data.durable_files import write_atomic
from engine.checkpoint.directory import commit, retain, sum_of
from engine.checkpoint.pieces import Piece, write_pieces

RUNNING, DONE = "running", "done"
LOOK_EVERY = 0.02  # seconds between two looks for the sums of the others


@dataclass(frozen=True)
class Told:
    """How far a rank is. `share` is of its own file; `outcome`, on rank 0, of the whole checkpoint."""

    share: str = RUNNING  # or DONE, or what went wrong
    outcome: str = RUNNING
    num_bytes: int = 0
    seconds: float = 0.0  # it took until `outcome` was known
    notes: tuple[str, ...] = ()


class Writing:
    """Starts with `start`, or is carried out at once by `run`. Raises nothing: `told` has what went wrong."""

    def __init__(
        self,
        draft: Path,
        rank: int,
        world_size: int,
        pieces: list[Piece],
        beside: Mapping[str, str],
        settings: Checkpoint,
    ) -> None:
        self._draft, self._rank, self._world_size = draft, rank, world_size
        self._pieces, self._beside, self._settings = pieces, beside, settings
        self._cancelled, self._has_share = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self.run, name=f"save {draft.name}", daemon=True)
        self._began = time.monotonic()
        self.told = Told()

    def start(self) -> None:
        """Begins `run` in a thread, which does not keep the process from ending."""
        self._thread.start()

    def run(self) -> None:
        """What goes wrong, whatever it is, has to reach the training rather than end with this thread."""
        try:
            self._say_of_share()
        finally:
            self._has_share.set()
        if self._rank == 0 and self.told.share == DONE:
            self._say_of_whole()

    def cancel(self) -> None:
        """On rank 0: others' files are not waited for any more."""
        self._cancelled.set()

    def wait_for_share(self) -> None:
        """Returns when this rank's file is written or has failed: `told.share` says which."""
        self._has_share.wait()

    def join(self) -> None:
        """Returns when the thread has ended; at once where there is none, after `run`."""
        if self._thread.is_alive():
            self._thread.join()

    def _tell(self, **changes: Any) -> None:
        """One assignment, so that another thread never sees half of it."""
        self.told = replace(self.told, seconds=time.monotonic() - self._began, **changes)

    def _say_of_share(self) -> None:
        try:
            num_bytes = self._write_share()
        except Exception as error:
            self._tell(share=_said(error), outcome=_said(error))
        else:
            self._tell(share=DONE, outcome=DONE if self._rank else RUNNING, num_bytes=num_bytes)

    def _say_of_whole(self) -> None:
        try:
            self._commit()
        except Exception as error:
            self._tell(outcome=_said(error))
        else:
            self._tell(outcome=DONE, notes=self._retain())

    def _write_share(self) -> int:
        path = self._draft / f"rank-{self._rank:05d}.safetensors"
        write_pieces(path, self._pieces)
        write_atomic(_sum_file(self._draft, self._rank), sum_of(path))
        return path.stat().st_size

    def _commit(self) -> None:
        for name, text in self._beside.items():
            write_atomic(self._draft / name, text)
        expected = [_sum_file(self._draft, rank) for rank in range(self._world_size)]
        while missing := [path for path in expected if not path.exists()]:
            if self._cancelled.wait(LOOK_EVERY):
                raise OSError(f"given up while {len(missing)} of {self._world_size} files were missing")
        sums = [path.read_text() for path in expected] + [sum_of(self._draft / name) for name in self._beside]
        for path in expected:
            path.unlink()
        commit(self._draft, sums)

    def _retain(self) -> tuple[str, ...]:
        """Removes what is too old; a file system that will not let go of it is no reason to lose the new one."""
        try:
            removed = retain(self._draft.parent, self._settings.keep_last, self._settings.keep_every)
        except (OSError, UserError) as error:
            return (f"could not remove an older one: {error}",)
        return tuple(f"removed {path.name}" for path in removed)


def _sum_file(draft: Path, rank: int) -> Path:
    return draft / f".rank-{rank:05d}.sum"


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
