"""Writing a latent store (data/latents/store.py): each rank its own files, with the sums that statistics are made of.

    writer = LatentWriter(directory, rank=0)
    writer.add(latents, mirrored, labels, positions)        # (b, L, h, w) twice, (b,) twice
    tally = writer.close()                                  # a Tally of this rank; add those of all ranks
    mean, std = sum(tallies[1:], tallies[0]).statistics()

The directory is one that data.manifest.staged gives: a store appears whole or not at all. A file that cannot be written
is a UserError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.permissions import follow_umask
from data.latents.files import FLIPPED, LABELS, LATENTS, POSITIONS, shard_name

SHARD_SIZE = 10_000  # pictures a file, as the public extraction has it


@dataclass
class Tally:
    """Files and samples written, and the sums over every stored value, mirrored latents included."""

    samples: dict[str, int] = field(default_factory=dict)  # file name -> pictures
    num_values: int = 0  # of one channel
    total_L: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares_L: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.samples | other.samples,
            self.num_values + other.num_values,
            self.total_L + other.total_L,
            self.squares_L + other.squares_L,
        )

    def count(self, latents: Tensor) -> None:
        """(b, L, h, w)."""
        values = latents.double()
        self.num_values += values.numel() // values.shape[1]
        self.total_L = self.total_L + values.sum(dim=(0, 2, 3))
        self.squares_L = self.squares_L + values.square().sum(dim=(0, 2, 3))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and (unbiased) standard deviation, (L,) float64.

        Over both orientations of every picture: that is what training draws from. LightningDiT's own come from
        10,000 pictures as they are.
        """
        mean_L = self.total_L / self.num_values
        variance_L = (self.squares_L - self.num_values * mean_L.square()) / (self.num_values - 1)
        return mean_L, variance_L.clamp_min(0).sqrt()


class LatentWriter:
    """Collects one rank's latents, `shard_size` a file. All batches have one shape and dtype, which the files keep."""

    def __init__(self, directory: Path, rank: int = 0, shard_size: int = SHARD_SIZE) -> None:
        self._directory, self._rank, self._shard_size = directory, rank, shard_size
        self._tally = Tally()
        self._waiting: dict[str, Tensor] = {}  # room for one file; pages not yet filled take no memory
        self._count = 0

    def add(self, latents: Tensor, mirrored: Tensor, labels: Tensor, positions: Tensor) -> None:
        """(b, L, h, w), the same of the mirrored pictures, (b,) and (b,) places in the corpus. On any device."""
        batch = {LATENTS: latents.cpu(), FLIPPED: mirrored.cpu(), LABELS: labels.cpu(), POSITIONS: positions.cpu()}
        for key in (LATENTS, FLIPPED):
            self._tally.count(batch[key])
        while len(batch[LABELS]):
            taken = min(self._shard_size - self._count, len(batch[LABELS]))
            for key, rows in batch.items():
                if key not in self._waiting:
                    self._waiting[key] = rows.new_empty((self._shard_size, *rows.shape[1:]))
                self._waiting[key][self._count : self._count + taken] = rows[:taken]
            self._count += taken
            batch = {key: rows[taken:] for key, rows in batch.items()}
            if self._count == self._shard_size:
                self._write()

    def close(self) -> Tally:
        """Writes what waits; what this rank has written."""
        if self._count:
            self._write()
        return self._tally

    def _write(self) -> None:
        name = shard_name(self._rank, len(self._tally.samples))
        tensors = {key: rows[: self._count] for key, rows in self._waiting.items()}
        described = {"total_size": str(self._count), "dtype": str(tensors[LATENTS].dtype), "device": "cpu"}
        try:
            save_file(tensors, self._directory / name, described)
            follow_umask(self._directory / name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._directory / name} cannot be written ({error}): see whether the disk is full; "
                "bfloat16 takes half"
            ) from None
        self._tally.samples[name] = self._count
        self._count = 0
