"""Random numbers of a step, drawn outside the model: a pure function of (seed, step, position).

A row's numbers depend on its global position and on nothing else in the batch. So a step is the same on 1 rank and on
256, and after a resume; and two runs of equal seed have equal noise, whatever their objective.

    draws = draw(DrawCounts(normals=64 * 16 * 16, uniforms=2), seed=0, step=7, positions=np.array([3, 5]))
    draws.normal_BN      # (2, 16384) float32; row 0 is that of position 3 in any batch
    draws.uniform_BU     # (2, 2) float32 in the open interval (0, 1)

Philox is counter-based: the counter says which (step, position) this is, so no two of them share numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NORMALS, _UNIFORMS = 0, 1  # streams: the number of normals does not change the uniforms


@dataclass(frozen=True)
class DrawCounts:
    """Number of random normals and uniforms that one row of a batch needs."""

    normals: int
    uniforms: int


@dataclass(frozen=True)
class RandomDraws:
    """Standard normals (B, normals) and uniforms (B, uniforms) of the open interval (0, 1); float32."""

    normal_BN: Tensor
    uniform_BU: Tensor

    def pinned(self) -> RandomDraws:
        """Copy to page-locked memory, from which a copy to a GPU is asynchronous."""
        return RandomDraws(self.normal_BN.pin_memory(), self.uniform_BU.pin_memory())

    def to(self, device: torch.device | str) -> RandomDraws:
        """Copy to `device`."""
        return RandomDraws(*(t.to(device, non_blocking=True) for t in (self.normal_BN, self.uniform_BU)))


class _Streams:
    """A Philox generator that jumps to any stream: the lowest word of its counter counts numbers, the others name the
    stream.

    One generator is reused, because creating one takes 43 us: it reads the machine's entropy first.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed)
        self._random = np.random.Generator(self._philox)
        self._state = self._philox.state  # fresh: no buffered words

    def at(self, step: int, position: int, purpose: int) -> np.random.Generator:
        """Return the generator at the start of a stream; valid until the next call."""
        self._state["state"]["counter"][:] = (0, position, step, purpose)
        self._philox.state = self._state
        return self._random


def draw(needs: DrawCounts, seed: int, step: int, positions: NDArray[np.int64]) -> RandomDraws:
    """Draw the numbers of the rows at these global `positions` (B,) of step `step`; on the host."""
    normal_BN = np.empty((len(positions), needs.normals), np.float32)
    uniform_BU = np.empty((len(positions), needs.uniforms), np.float32)
    streams = _Streams(seed)
    for row, position in enumerate(positions.tolist()):
        streams.at(step, position, _NORMALS).standard_normal(dtype=np.float32, out=normal_BN[row])
        bits_U = streams.at(step, position, _UNIFORMS).integers(1 << 23, size=needs.uniforms)
        uniform_BU[row] = (bits_U + 0.5) * 2.0**-23  # exact in float32, and neither 0 nor 1
    return RandomDraws(torch.from_numpy(normal_BN), torch.from_numpy(uniform_BU))
