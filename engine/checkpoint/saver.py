"""Saves while the training goes on; see the package.

    saver = Saver(root, config)
    saver.save(300, training.kept())        # the steps wait for a copy in memory; a thread writes it
    saver.news()                            # at reports: what has been saved, or could not be
    saver.finish()                          # at the end: all is on disk, or CheckpointError

A failed save does not end a run: the last good checkpoint stays, the log says what is wrong, and the next save tries
again. Only one that must not fail, at the end or on request, raises.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configs import RunConfig, UserError, to_yaml
from engine import world
from engine.agreement import trouble_of_first
from engine.checkpoint import contents, directory
from engine.checkpoint.copies import Copies
from engine.checkpoint.writing import DONE, RUNNING, Told, Writing
from engine.health.failure import TrainingFailed
from engine.training import Kept


class CheckpointError(TrainingFailed):
    """A checkpoint that was asked for is not on disk. The one before it is."""

    def __init__(self, message: str) -> None:
        super().__init__("checkpoint", message)


@dataclass(frozen=True)
class News:
    """What has become of a save. `words` are for the log, `scalars` for TensorBoard."""

    words: str
    scalars: dict[str, float]
    is_good: bool


class Saver:
    """Of the checkpoints in `root`, on every rank. Methods but `close` are collectives."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._root, self._config = root, config
        self._copies = Copies()
        self._writing: Writing | None = None
        self._news: list[News] = []
        self._step, self._stall = 0, 0.0  # of the save under way: steps finished, seconds that the training waited

    def save(self, step: int, kept: Kept, consumed: contents.Consumed = contents.NOTHING) -> None:
        """Begins to save what is after `step` steps; a save under way has to be over first.

        The training stands still for a copy in host memory; with system.checkpoint.background=false, for the disk.
        """
        began = time.monotonic()
        self._settle(is_patient=True)
        draft, settings = directory.draft_of(self._root, step), self._config.system.checkpoint
        if trouble := trouble_of_first(lambda: self._make(draft)):
            self._news.append(self._failure(step, trouble))
            return
        own, state = contents.pieces(kept), contents.state_of(step, kept, self._config, consumed)
        beside = {"state.json": json.dumps(asdict(state)), "config.yaml": to_yaml(self._config)}
        held = self._copies.take(own) if settings.background else own
        self._writing = Writing(draft, world.rank(), world.world_size(), held, beside, settings)
        self._step = step
        if settings.background:
            self._writing.start()
        else:
            self._writing.run()
        self._stall = time.monotonic() - began

    def news(self) -> list[News]:
        """What became of saves since this was last asked. Waits for nothing."""
        self._settle(is_patient=False)
        said, self._news = self._news, []
        return said

    def settle(self) -> list[News]:
        """The news when the save under way is over."""
        self._settle(is_patient=True)
        return self.news()

    def finish(self) -> list[News]:
        """As `settle`. Raises CheckpointError, on all ranks, where the last save failed."""
        news = self.settle()
        if news and not news[-1].is_good:
            raise CheckpointError(news[-1].words)
        return news

    def close(self) -> None:
        """Gives up a save under way."""
        if self._writing is not None:
            self._writing.cancel()

    def _make(self, draft: Path) -> None:
        directory.clear_drafts(self._root)
        draft.mkdir(parents=True)

    def _settle(self, is_patient: bool) -> None:
        """Takes down the outcome that all ranks agree on; nothing where there is no save, or it is still under way."""
        if (writing := self._writing) is None:
            return
        if is_patient:
            writing.wait_for_share()
        told = world.gather_objects(writing.told)
        trouble = _trouble(told)
        if trouble:
            writing.cancel()
        if is_patient or (trouble and all(each.share != RUNNING for each in told)):
            writing.join()
            told = world.gather_objects(writing.told)
        if RUNNING in (told[0].outcome, *(each.share for each in told)):
            return
        self._writing = None
        trouble = trouble or _trouble(told)
        self._news.append(self._failure(self._step, trouble) if trouble else self._success(told))

    def _success(self, told: list[Told]) -> News:
        size, seconds = sum(each.num_bytes for each in told), told[0].seconds
        words = f"saved {self._root / directory.name_of(self._step)}: {size / 2**20:.1f} MiB in {seconds:.1f} s"
        words += f", of which the steps waited {1e3 * self._stall:.0f} ms"
        words += "".join(f"; {note}" for note in told[0].notes)
        scalars = {"stall_ms": 1e3 * self._stall, "seconds": seconds, "mib": size / 2**20, "failed": 0.0}
        return News(words, {f"checkpoint/{name}": value for name, value in scalars.items()}, is_good=True)

    def _failure(self, step: int, trouble: str) -> News:
        trouble_of_first(lambda: directory.clear_drafts(self._root))  # a full disk needs the room
        try:
            good = directory.candidates(self._root)[:1]
        except (OSError, UserError):
            last = "the checkpoints before it cannot be seen now"
        else:
            last = f"the last good checkpoint is {good[0].name}" if good else "there is no checkpoint yet"
        return News(f"could not save {directory.name_of(step)}: {trouble}; {last}", {"checkpoint/failed": 1.0}, False)


def save(root: Path, step: int, kept: Kept, config: RunConfig) -> Path:
    """One checkpoint, on disk when this returns. A collective. Raises CheckpointError."""
    saver = Saver(root, config)
    saver.save(step, kept)
    saver.finish()
    return root / directory.name_of(step)


def _trouble(told: list[Told]) -> str:
    """What went wrong, as the rank says whose it was: rank 0 gives up because of another. Nothing where all is well."""
    said = [*enumerate(each.share for each in told), *enumerate(each.outcome for each in told)]
    return next((f"rank {rank}: {words}" for rank, words in said if words not in (RUNNING, DONE)), "")
