"""Non-finite losses and gradients, spikes of the gradient's norm, and stop requests: noticed without slowing a step.

    guard = GradNormGuard(config.health, device, name=MAIN)
    guard(norm)                        # a bool on the device: skip this optimizer step. Called once a step
    anomalies = AnomalyMonitor(comm, device, config.health, task.setup.guards)
    anomalies.watch(losses.total)      # every step, no host sync
    counts = anomalies.read(step)      # at reports; the same on every rank
    anomalies.act(counts)              # raises on all ranks or on none: TrainingFailed, or RollbackRequested
    if anomalies.should_stop(): ...    # at reports; the same answer on every rank

Counts are kept on the device and read at reports only; the stop flag is agreed between ranks there too.
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
from engine import distributed, run_directory
from engine.checkpoint.tensor_ranges import GRAD_NORMS, RangeReader, TensorRange
from model.losses.comm import Comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C, closed terminal; ignored under nohup and `&`
SIGINT_REPEAT_SECONDS = 1.0  # SIGINTs within it count as one: a terminal and a launcher may both send it


class TrainingFailed(RuntimeError):
    """The training failed by itself; going on from the last checkpoint would most likely fail the same way.

    The exit code is FAILED (engine/exits.py). Raised on every rank, or on none. `kind` is one word for what counts
    failures: "nonfinite", "spike", "replicas", "checkpoint", "weights".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class GradNormGuard:
    """Decide on the device which optimizer steps of an engine are skipped, and count non-finite norms and spikes.

    The norm is that of the whole gradient, so every rank decides alike without asking the others, or the host. A spike
    is a norm above `spike_factor` times the median of the last `spike_window` ones. A spike enters the window too:
    where the norm has come to stay at another level, that level is the median half a window later.

    `name` is the engine's in a checkpoint. `recent` (spike_window,) float32 is the window, oldest first, NaN where no
    step was yet; None with health.spike=off. The window is state of the run (Stateful).
    """

    def __init__(self, health: AnomalyPolicy, device: torch.device, name: str) -> None:
        self._health, self._name = health, name
        self.counts = torch.zeros(2, device=device)  # since `reset_counts`: non-finite norms, spikes
        self.recent = None if health.spike == "off" else torch.full((health.spike_window,), math.nan, device=device)

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> Tensor:
        """Return whether to skip the step, a scalar bool. `norm` is DeepSpeed's is inf or -1 if not finite."""
        norm = norm.to(self.counts.device, torch.float32)
        is_finite = torch.isfinite(norm) & (norm >= 0)
        is_spike = self._is_spike(norm, is_finite)
        self.counts += torch.stack((~is_finite, is_spike))
        return ~is_finite | is_spike if self._health.spike == "skip" else ~is_finite

    def reset_counts(self) -> None:
        """Count from 0 again."""
        self.counts.zero_()

    def state_ranges(self) -> list[TensorRange]:
        """Return the window, the same on every rank: the first saves it."""
        if self.recent is None or not distributed.is_first():
            return []
        return [TensorRange(GRAD_NORMS, self._name, 0, self.recent)]

    def load_ranges(self, reader: RangeReader) -> None:
        """Load the window; it is empty where the checkpoint has none, or one of another length (--allow-change)."""
        self.reset_counts()
        if self.recent is None:
            return
        is_ours = self._name in reader.names(GRAD_NORMS) and reader.numel(GRAD_NORMS, self._name) == len(self.recent)
        self.recent.copy_(reader.read(GRAD_NORMS, self._name) if is_ours else torch.full_like(self.recent, math.nan))

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """List the window."""
        return [] if self.recent is None else [(f"recent norms of {self._name}", self.recent)]

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """Empty."""
        return []

    def _is_spike(self, norm: Tensor, is_finite: Tensor) -> Tensor:
        if self.recent is None:
            return torch.zeros_like(is_finite)
        # The median of a window that is not full is NaN, which nothing exceeds.
        is_spike = is_finite & (norm > self._health.spike_factor * self.recent.median())
        self.recent.copy_(torch.where(is_finite, torch.cat((self.recent[1:], norm.reshape(1))), self.recent))
        return is_spike


@dataclass(frozen=True)
class AnomalyCounts:
    """Anomalies since the last report, which came after `step` steps; summed over engines."""

    step: int
    losses: int  # non-finite, over all ranks
    gradients: int  # steps with a non-finite gradient; their optimizer steps were skipped
    spikes: int  # steps with a spike of the gradient's norm
    skipped: int  # optimizer steps skipped

    def values(self) -> dict[str, float]:
        """Return them as scalars of a report."""
        return {
            "health/nonfinite_losses": float(self.losses),
            "health/nonfinite_gradients": float(self.gradients),
            "health/spikes": float(self.spikes),
            "health/skipped_steps": float(self.skipped),
        }

    def __str__(self) -> str:
        counts = {"non-finite losses": self.losses, "non-finite gradients": self.gradients, "spikes": self.spikes}
        return f"{', '.join(f'{n} {name}' for name, n in counts.items() if n) or 'nothing'} up to step {self.step}"


class RollbackRequested(Exception):
    """The run is to go back to its last checkpoint, and on with other data. Raised on every rank."""

    def __init__(self, kind: str, counts: AnomalyCounts) -> None:
        super().__init__(str(counts))
        self.kind, self.counts = kind, counts


class AnomalyMonitor:
    """Count anomalies on the device, raise the exceptions of config.health, and remember a stop signal."""

    def __init__(
        self, comm: Comm, device: torch.device, health: AnomalyPolicy, guards: Sequence[GradNormGuard]
    ) -> None:
        self._comm, self._health, self._guards = comm, health, guards
        self._nonfinite_losses = torch.zeros((), device=device)
        self._got_signal, self._first_sigint = False, math.inf  # time.monotonic() of the first SIGINT
        self._run_dir: Path | None = None

    def listen(self, run_dir: Path) -> None:
        """Install signal handlers: SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) make the run save
        and stop, as the file `stop` in its directory does; a second Ctrl-C ends it at once."""
        self._run_dir = run_dir
        unignored = [number for number in TERMINAL_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in (*STOP_SIGNALS, *unignored):
            signal.signal(number, self._on_signal)

    def watch(self, loss: Tensor) -> None:
        """Count the step's loss if it is not finite; no host sync."""
        self._nonfinite_losses += (~torch.isfinite(loss.detach())).sum()

    def read(self, step: int) -> AnomalyCounts:
        """Return the counts since the last read, and count from 0 again. A collective; waits for the device."""
        losses = int(self._comm.all_sum(self._nonfinite_losses))
        counts = [guard.counts.tolist() for guard in self._guards]
        self.reset_counts()
        gradients, spikes = (sum(int(count[idx]) for count in counts) for idx in (0, 1))
        skipped = gradients + (spikes if self._health.spike == "skip" else 0)
        return AnomalyCounts(step, losses, gradients, spikes, skipped)

    def reset_counts(self) -> None:
        """Count from 0 again."""
        self._nonfinite_losses.zero_()
        for guard in self._guards:
            guard.reset_counts()

    def act(self, counts: AnomalyCounts) -> None:
        """Raise TrainingFailed or RollbackRequested where health.nonfinite or health.spike asks for it."""
        if counts.losses and self._health.nonfinite == "stop":
            raise TrainingFailed(
                "nonfinite",
                f"{counts}: the steps after the last checkpoint cannot be trusted; resume from it with a lower "
                "optim.lr or with health.nonfinite=skip (--allow-change), or look in runs/NAME/log.jsonl for the term "
                "that blew up first",
            )
        if self._health.nonfinite == "rollback" and (counts.losses or counts.gradients):
            raise RollbackRequested("nonfinite", counts)
        if self._health.spike == "rollback" and counts.spikes:
            raise RollbackRequested("spike", counts)

    def should_stop(self) -> bool:
        """Whether any rank received a stop signal or sees the stop file. A collective: call it at the same step."""
        sees_file = (
            distributed.is_first() and self._run_dir is not None and run_directory.is_stop_requested(self._run_dir)
        )
        return distributed.any_rank(self._got_signal or sees_file)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._first_sigint > SIGINT_REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._first_sigint = min(self._first_sigint, now)
        if not self._got_signal and distributed.is_first():
            message = f"{signal.Signals(number).name}: the run saves at its next report and ends"
            message += "; a second Ctrl-C ends it at once, unsaved" if number == signal.SIGINT else ""
            with suppress(OSError):  # not through sys.stderr: the signal may have interrupted a write to it
                os.write(2, f"{message}\n".encode())
        self._got_signal = True
