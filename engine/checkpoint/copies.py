"""A rank's pieces as they are in one moment, in host memory that is asked for once and used again at every save.

    copies = Copies()
    held = copies.take(contents.pieces(kept))       # the next step may change the originals now

The price of saving behind the steps: as much host memory as this rank's share of a checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.checkpoint.pieces import Piece


class Copies:
    """Buffers by (key, name); page-locked where the pieces come from a GPU, so that copies run at the bus's speed."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, pieces: list[Piece]) -> list[Piece]:
        """Pieces of the same content; valid until the next call. Waits for the device."""
        copied = [replace(piece, values=self._buffer(piece).copy_(piece.values, non_blocking=True)) for piece in pieces]
        if any(piece.values.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return copied

    def _buffer(self, piece: Piece) -> Tensor:
        place, values = (piece.key, piece.name), piece.values
        found = self._buffers.get(place)
        if found is None or found.shape != values.shape or found.dtype != values.dtype:
            found = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[place] = found
        return found
