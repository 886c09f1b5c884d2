"""Latent store: the latents of a corpus on disk, in LightningDiT's layout, written by all ranks and read at random.

    DIR/latents_rank00_shard000.safetensors ...   latents, latents_flip (n, L, h, w), labels (n,); 10,000 a file
    DIR/latents_stats.pt                          mean, std (1, L, 1, 1), by which training normalises
    DIR/manifest.json                             tokenizer, corpus and crop; a public store has none

    writer = LatentWriter(directory, rank=0)
    writer.add(latents, mirrored, labels, positions)        # (b, L, h, w) twice, (b,) twice
    sums = writer.close()                                   # ChannelSums of this rank; add those of all ranks
    mean, std = sum(all_sums[1:], all_sums[0]).statistics()

    store = LatentStore("latents/vtp_l")
    store.shape, store.num_samples, store.num_classes       # (64, 16, 16), 1281167, 1000
    latents, labels = store.read([7, 3], [False, True])     # (2, 64, 16, 16) as stored, (2,); image 3 mirrored

Our files also hold `positions`: the number of each image in the corpus. By them, index i is the same image whatever
number of ranks wrote the store. Only labels and positions are held in memory; latents are read row by row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.command_line import apply_umask
from data.bad_samples import StorageError
from data.corpus_directory import MANIFEST
from data.latents.channel_statistics import ChannelSums, read_channel_statistics
from data.latents.files import (
    FLIPPED,
    LABELS,
    LATENTS,
    POSITIONS,
    REMEDY,
    OpenLatentFile,
    latent_file_name,
    list_latent_files,
    read_latent_file,
)
from data.storage import LruCache, StorageRetries

_OPEN_FILES = 128  # files kept open; the usual limit of a process is 1,024
_TRIES = 6  # unless system.loader.tries is given
SHARD_SIZE = 10_000  # images a file, as the public extraction has it


class LatentStore:
    """The latents below `directory`, by index: 0, 1, ... num_samples - 1, in the order of the corpus.

    `mean` and `std` are (L,) float32, `labels` (num_samples,) int64, `notes` the manifest, empty for a public store.
    Raises UserError for a store that is missing, damaged or incomplete. Storage errors are retried, up to `tries` tries
    (data/storage.py).
    """

    def __init__(self, directory: str | Path, tries: int = _TRIES) -> None:
        self.directory, self.retries = Path(directory), StorageRetries(tries)
        self.notes = _read_manifest(self.directory)
        self._files = [read_latent_file(path) for path in list_latent_files(self.directory)]
        first = self._files[0]
        for file in self._files:
            if (file.shape, file.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{file.path} holds latents {file.shape} in {file.dtype}, {first.path.name} {first.shape} in "
                    f"{first.dtype}: files of one store are alike; {REMEDY}"
                )
        self.shape: tuple[int, int, int] = first.shape  # type: ignore[assignment]
        self.dtype = first.dtype
        self.has_flips = all(file.has_flips for file in self._files)
        self.mean, self.std = read_channel_statistics(self.directory, self.shape[0])
        self.labels = torch.cat([file.labels for file in self._files])
        counts = [len(file.labels) for file in self._files]
        self._file_idx: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._row_idx: NDArray[np.int64] = np.concatenate([np.arange(count) for count in counts])
        self._sort()
        keys = (LATENTS, FLIPPED) if self.has_flips else (LATENTS,)
        self._open = LruCache(lambda file_idx: OpenLatentFile(self._files[file_idx], keys), _OPEN_FILES)

    @property
    def num_samples(self) -> int:
        """Number of images, each with one latent as it is and one mirrored."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the highest label."""
        return int(self.labels.max()) + 1

    @property
    def tokenizer(self) -> str | None:
        """The digest (model.weights.digest) of the tokenizer that made the latents; None where it is not recorded."""
        return self.notes.get("arguments", {}).get("tokenizer")

    def read(self, indices: ArrayLike, flipped: ArrayLike) -> tuple[Tensor, Tensor]:
        """Read (n, L, h, w) latents as stored, not normalised, and (n,) int64 labels, by (n,) indices and flags.

        Raises UserError where mirrored latents are requested and the store has none, and for a file that is gone or
        has changed since the start; StorageError where storage does not answer.
        """
        idx, is_flipped = np.asarray(indices, np.int64), np.asarray(flipped, bool)
        if is_flipped.any() and not self.has_flips:
            raise UserError(f"{self.directory} holds no {FLIPPED}: train without flips, or {REMEDY}")
        latents = torch.empty(len(idx), *self.shape, dtype=self.dtype)
        rows = latents.flatten(1).view(torch.uint8).numpy()  # the same memory
        for row in np.argsort(self._file_idx[idx], kind="stable"):  # file by file, so that each is opened once
            file_idx, file_row = int(self._file_idx[idx[row]]), int(self._row_idx[idx[row]])
            key = FLIPPED if is_flipped[row] else LATENTS
            rows[row] = np.frombuffer(self._read_row(file_idx, key, file_row), np.uint8)
        return latents, self.labels[idx]

    def _sort(self) -> None:
        """Sort the indices into the order of the corpus, where the files have positions."""
        positions = [file.positions for file in self._files if file.positions is not None]
        if len(positions) == len(self._files):
            order = np.argsort(torch.cat(positions).numpy(), kind="stable")
            self._file_idx, self._row_idx, self.labels = self._file_idx[order], self._row_idx[order], self.labels[order]

    def _read_row(self, file_idx: int, key: str, row: int) -> bytes:
        path = self._files[file_idx].path
        try:
            return self.retries(lambda: self._read_once(file_idx, key, row))
        except FileNotFoundError:
            raise UserError(
                f"{path} is gone since the start: a store stays as it is while a run reads it; put the file back and "
                f"go on with --resume, or {REMEDY}"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{path} cannot be read ({error}), tried system.loader.tries={self.retries.tries} times: storage does "
                "not answer; when it does again, go on with --resume"
            ) from error

    def _read_once(self, file_idx: int, key: str, row: int) -> bytes:
        try:
            return self._open(file_idx).read(key, row)
        except OSError:
            self._open.drop(file_idx)  # the open file may be what is broken
            raise


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest; {} without one. Raises UserError where a file it lists is missing or cut short."""
    path = directory / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        notes, shards = dict(manifest), {name: int(of["bytes"]) for name, of in manifest["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a manifest of this program; {REMEDY}") from None
    for name, num_bytes in shards.items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != num_bytes:
            raise UserError(f"{directory / name} is missing or cut short, by {MANIFEST}; {REMEDY}")
    return notes


class LatentWriter:
    """Writes one rank's latents, `shard_size` a file. All batches have one shape and dtype, those of the files.

    Write into a data.corpus_directory.staged_directory: a store appears whole or not at all. A file that cannot be
    written is a UserError.
    """

    def __init__(self, directory: Path, rank: int = 0, shard_size: int = SHARD_SIZE) -> None:
        self._directory, self._rank, self._shard_size = directory, rank, shard_size
        self._sums = ChannelSums()
        self._waiting: dict[str, Tensor] = {}  # space for one file; unused pages take no memory
        self._count = 0

    def add(self, latents: Tensor, mirrored: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Add (b, L, h, w) latents, those of the mirrored images, (b,) labels and (b,) positions; from any device."""
        batch = {LATENTS: latents.cpu(), FLIPPED: mirrored.cpu(), LABELS: labels.cpu(), POSITIONS: positions.cpu()}
        for key in (LATENTS, FLIPPED):
            self._sums.count(batch[key])
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

    def close(self) -> ChannelSums:
        """Write what waits; return the sums of all that this rank has written."""
        if self._count:
            self._write()
        return self._sums

    def _write(self) -> None:
        name = latent_file_name(self._rank, len(self._sums.samples))
        tensors = {key: rows[: self._count] for key, rows in self._waiting.items()}
        described = {"total_size": str(self._count), "dtype": str(tensors[LATENTS].dtype), "device": "cpu"}
        try:
            save_file(tensors, self._directory / name, described)
            apply_umask(self._directory / name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._directory / name} cannot be written ({error}): see whether the disk is full; "
                "bfloat16 takes half"
            ) from None
        self._sums.samples[name] = self._count
        self._count = 0
