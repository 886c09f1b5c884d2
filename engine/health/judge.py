"""Which steps an engine's optimizer does not take, and which are counted: decided where the gradient's norm lies.

    judge = Judge(config.health, device, name=MAIN)
    judge(norm)                 # a bool on the device: leave this step out. Called once a step, before the optimizer
    judge.counts                # (2,) since `forget`: norms that were no numbers, spikes

The norm is that of the whole gradient, so every rank decides alike without a word to the others, and without the host.
A spike is a norm above `spike_factor` times the median of the last `spike_window` ones. A spike enters the window too:
where the norm has come to stay at another level, that level is the median half a window later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from configs.run import AnomalyPolicy
from engine import world
from engine.checkpoint.pieces import NORMS, Piece, Pieces


class Judge:
    """Of the engine that a checkpoint calls `name`. A Follower (engine/training.py): its window is the run's state.

    `recent` (spike_window,) float32 is that window, oldest first, NaN where no step was yet; None with spike=off.
    """

    def __init__(self, health: AnomalyPolicy, device: torch.device, name: str) -> None:
        self._health, self._name = health, name
        self.counts = torch.zeros(2, device=device)
        self.recent = None if health.spike == "off" else torch.full((health.spike_window,), math.nan, device=device)

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> Tensor:
        """Scalar bool. `norm`: a scalar; DeepSpeed says of a gradient that is no number that its norm is inf or -1."""
        norm = norm.to(self.counts.device, torch.float32)
        is_number = torch.isfinite(norm) & (norm >= 0)
        is_spike = self._is_spike(norm, is_number)
        self.counts += torch.stack((~is_number, is_spike))
        return ~is_number | is_spike if self._health.spike == "skip" else ~is_number

    def forget(self) -> None:
        """Counts from 0 again."""
        self.counts.zero_()

    def pieces(self) -> list[Piece]:
        """The window, the same on every rank: the first writes it."""
        if self.recent is None or not world.is_first():
            return []
        return [Piece(NORMS, self._name, 0, self.recent)]

    def restore(self, pieces: Pieces) -> None:
        """The window as a checkpoint has it; empty where it has none, or one of another length (--allow-change)."""
        self.forget()
        if self.recent is None:
            return
        is_ours = self._name in pieces.names(NORMS) and pieces.numel(NORMS, self._name) == len(self.recent)
        self.recent.copy_(pieces.read(NORMS, self._name) if is_ours else torch.full_like(self.recent, math.nan))

    def replicas(self) -> list[tuple[str, Tensor]]:
        """The window."""
        return [] if self.recent is None else [(f"recent norms of {self._name}", self.recent)]

    def copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """None."""
        return []

    def _is_spike(self, norm: Tensor, is_number: Tensor) -> Tensor:
        if self.recent is None:
            return torch.zeros_like(is_number)
        # The median of a window that is not full is NaN, which nothing exceeds.
        is_spike = is_number & (norm > self._health.spike_factor * self.recent.median())
        self.recent.copy_(torch.where(is_number, torch.cat((self.recent[1:], norm.reshape(1))), self.recent))
        return is_spike
