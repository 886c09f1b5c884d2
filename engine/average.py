"""A running average of everything an engine trains: fp32, each rank of its own share, no communication.

    average <- momentum * average + (1 - momentum) * weights

Sampling and evaluation use it in place of the weights (generators: 0.9999 [P]; decoders after a GAN). Training never
reads it, so unlike the teacher of self-distillation (engine/teacher.py) it has no module in the model: fragments of
fp32 beside the optimizer's, and a key of its own in checkpoints.

    average = Average(engine, name=MAIN)
    average.follow(0.9999)                       # after every step
    archive.whole_weights(checkpoint, AVERAGE)   # by name, when the run is over
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine import zero
from engine.checkpoint.pieces import AVERAGE, MASTER, Piece, Pieces, label


class Average:
    """Of the engine that a checkpoint calls `name`; starts as its weights are now."""

    def __init__(self, engine: Any, name: str) -> None:
        self._name = name
        self._fragments = zero.fragments(engine)
        self._averages = [fragment.read(MASTER).float().clone() for fragment in self._fragments]

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """One step toward the weights, after the optimizer's."""
        weights = [fragment.read(MASTER) for fragment in self._fragments]
        if weights:
            torch._foreach_lerp_(self._averages, weights, 1.0 - momentum)

    def pieces(self) -> list[Piece]:
        """This rank's share, to be written."""
        pairs = zip(self._fragments, self._averages, strict=True)
        return [Piece(AVERAGE, label(self._name, fragment.name), fragment.start, values) for fragment, values in pairs]

    @torch.no_grad()
    def restore(self, pieces: Pieces) -> None:
        """This rank's share, from a checkpoint."""
        for fragment, values in zip(self._fragments, self._averages, strict=True):
            values.copy_(pieces.read(AVERAGE, label(self._name, fragment.name), fragment.start, fragment.numel))

    def replicas(self) -> list[tuple[str, Tensor]]:
        """None: each rank has its own share."""
        return []

    def copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """None: the average is no module of the model."""
        return []
