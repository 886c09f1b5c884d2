"""Watching a run without slowing it: what went wrong in its steps, and a polite stop.

Both are read only at reports: counts are kept on the device and the stop flag is agreed between ranks, so no step waits
for either.

    guard = Guard(comm, device, config.health, training.judges)
    guard.watch(losses.total)          # every step, no sync
    found = guard.read(step)           # at reports; the same on every rank
    guard.act(found)                   # raises on all ranks or on none: TrainingFailed, or GoBack
    if guard.should_stop(): ...        # at reports; the same answer on every rank
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from configs.run import AnomalyPolicy
from engine import stop_file, world
from engine.health.failure import TrainingFailed
from engine.health.judge import Judge
from model.losses.comm import Comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C, closed terminal; ignored under nohup and `&`
SIGINT_REPEAT_SECONDS = 1.0  # SIGINTs within it count as one: a terminal and a launcher may both send it


@dataclass(frozen=True)
class Found:
    """What went wrong since the last report, which came after `step` steps. Over all engines."""

    step: int
    losses: int  # no numbers, over all ranks
    gradients: int  # of steps: no numbers; their optimizer steps were left out
    spikes: int  # of steps: of the gradient's norm
    skipped: int  # optimizer steps left out

    def values(self) -> dict[str, float]:
        """For a report."""
        return {
            "health/nonfinite_losses": float(self.losses),
            "health/nonfinite_gradients": float(self.gradients),
            "health/spikes": float(self.spikes),
            "health/skipped_steps": float(self.skipped),
        }

    def __str__(self) -> str:
        counts = {"non-finite losses": self.losses, "non-finite gradients": self.gradients, "spikes": self.spikes}
        return f"{', '.join(f'{n} {name}' for name, n in counts.items() if n) or 'nothing'} up to step {self.step}"


class GoBack(Exception):
    """The run is to go back to its last checkpoint, and on with other data. Raised on every rank."""

    def __init__(self, kind: str, found: Found) -> None:
        super().__init__(str(found))
        self.kind, self.found = kind, found


class Guard:
    """Counts what goes wrong on the device and remembers a stop signal."""

    def __init__(self, comm: Comm, device: torch.device, health: AnomalyPolicy, judges: Sequence[Judge]) -> None:
        self._comm, self._health, self._judges = comm, health, judges
        self._non_finite = torch.zeros((), device=device)
        self._was_asked, self._first_sigint = False, math.inf  # time.monotonic() of the first SIGINT
        self._run_dir: Path | None = None

    def listen(self, run_dir: Path) -> None:
        """Install signal handlers: SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) make the run save
        and stop, as the file `stop` in its directory does; a second Ctrl-C ends it at once."""
        self._run_dir = run_dir
        unignored = [number for number in TERMINAL_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in (*STOP_SIGNALS, *unignored):
            signal.signal(number, self._ask)

    def watch(self, loss: Tensor) -> None:
        """Counts the step's loss if it is not finite; no host sync."""
        self._non_finite += (~torch.isfinite(loss.detach())).sum()

    def read(self, step: int) -> Found:
        """What there was since the last read, and a new start. A collective; waits for the device."""
        losses = int(self._comm.all_sum(self._non_finite))
        counts = [judge.counts.tolist() for judge in self._judges]
        self.forget()
        gradients, spikes = (sum(int(count[place]) for count in counts) for place in (0, 1))
        skipped = gradients + (spikes if self._health.spike == "skip" else 0)
        return Found(step, losses, gradients, spikes, skipped)

    def forget(self) -> None:
        """Counts from 0 again."""
        self._non_finite.zero_()
        for judge in self._judges:
            judge.forget()

    def act(self, found: Found) -> None:
        """Raises TrainingFailed or GoBack where health.nonfinite or health.spike asks for it."""
        if found.losses and self._health.nonfinite == "stop":
            raise TrainingFailed(
                "nonfinite",
                f"{found}: the steps after the last checkpoint cannot be trusted; resume from it with a lower optim.lr "
                "or with health.nonfinite=skip (--allow-change), or look in runs/NAME/log.jsonl for the term that blew "
                "up first",
            )
        if self._health.nonfinite == "rollback" and (found.losses or found.gradients):
            raise GoBack("nonfinite", found)
        if self._health.spike == "rollback" and found.spikes:
            raise GoBack("spike", found)

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective: call it on every rank at the same step."""
        sees_file = world.is_first() and self._run_dir is not None and stop_file.is_asked(self._run_dir)
        return world.any_rank(self._was_asked or sees_file)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._first_sigint > SIGINT_REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._first_sigint = min(self._first_sigint, now)
        if not self._was_asked and world.is_first():
            message = f"{signal.Signals(number).name}: the run saves at its next report and ends"
            message += "; a second Ctrl-C ends it at once, unsaved" if number == signal.SIGINT else ""
            with suppress(OSError):  # not through sys.stderr: the signal may have interrupted a write to it
                os.write(2, f"{message}\n".encode())
        self._was_asked = True
