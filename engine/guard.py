"""Watching a run without slowing it: finite losses, and a polite stop.

Both are read only at reports: the finite flag is summed on the device and the stop flag is agreed between ranks, so no
step waits for either.

    guard = Guard(comm, device)
    guard.watch(losses.total)          # every step, no sync
    guard.check(step)                  # at reports; raises on all ranks or on none
    if guard.should_stop(): ...        # at reports; the same answer on every rank
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
from torch import Tensor

from engine import world
from model.objectives.comm import Comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 143  # exit code after a checkpoint made on request: 128 + SIGTERM, as the shell would report it


class NonFiniteLoss(RuntimeError):
    """A loss was NaN or infinite. Nothing was saved since the last checkpoint, so that one is good."""


class Guard:
    """Counts non-finite losses on the device and remembers a stop signal."""

    def __init__(self, comm: Comm, device: torch.device) -> None:
        self._comm = comm
        self._non_finite = torch.zeros((), device=device)
        self._was_asked = False

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 ask the run to save and leave."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def watch(self, loss: Tensor) -> None:
        """Counts the step's loss if it is not finite; no host sync."""
        self._non_finite += (~torch.isfinite(loss.detach())).sum()

    def check(self, step: int) -> None:
        """Raises NonFiniteLoss on every rank if any loss on any rank since the last check was not finite."""
        count = int(self._comm.all_sum(self._non_finite))
        self._non_finite.zero_()
        if count:
            raise NonFiniteLoss(
                f"{count} non-finite losses up to step {step}: the weights cannot be trusted; resume from the last "
                "checkpoint with a lower optim.lr, or look in runs/NAME/log.jsonl for the term that blew up first"
            )

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective: call it on every rank at the same step."""
        return world.any_rank(self._was_asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._was_asked = True
