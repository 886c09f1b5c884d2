"""How much of the trunk's gradient each objective asks for.

    shares = GradientShares(every=100, device=device)
    shares.watch(step, outputs.branch_features)            # before backward; hooks on one step in a hundred
    shares.read(comm)                            # {"health/grad_share/clip": 0.7, "health/grad_share/ssl": 0.2, ...}

Looked at is d (weight * objective) / d features where the model forks to its objectives (model/pretrainer.py): behind
the trunk, and behind the bottleneck where all objectives read that. There each objective's gradient passes by itself in
the one backward pass of the step, so it costs a norm of (T, D) an objective and no second backward. A share is an
objective's norm by the sum of their norms: gradients that point apart are counted whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from model.losses.comm import Comm


class GradientShares:
    """Of one rank. Every `every` steps are looked at, the last of each so many; 0: none."""

    def __init__(self, every: int, device: torch.device) -> None:
        self._every, self._device = every, device
        self._squares: dict[str, Tensor] = {}

    def watch(self, step: int, forks: Mapping[str, Tensor]) -> None:
        """Looks at the gradients of a forward of step `step` (counted from 0). With micro-batches once for each."""
        if not self._every or (step + 1) % self._every:
            return
        for name, fork in forks.items():
            self._squares.setdefault(name, torch.zeros((), device=self._device))
            if fork.requires_grad:
                fork.register_hook(partial(self._add, name))

    def read(self, comm: Comm) -> dict[str, float]:
        """Root mean squares over the steps that were looked at since the last read, as shares; nothing where there were
        none, or one objective. A collective; waits for the device."""
        names, squares = list(self._squares), list(self._squares.values())
        self._squares = {}
        if len(names) < 2:
            return {}
        norms = comm.all_sum(torch.stack(squares)).sqrt()
        shares = (norms / norms.sum()).tolist()
        return {f"health/grad_share/{name}": share for name, share in zip(names, shares, strict=True)}

    def _add(self, name: str, gradient: Tensor) -> None:
        self._squares[name] += torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
