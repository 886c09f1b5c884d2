"""A corpus's pictures as latents on a disk, in the layout that LightningDiT writes and reads; read here at random.

    DIR/latents_rank00_shard000.safetensors ...   latents, latents_flip (n, L, h, w), labels (n,); 10,000 a file
    DIR/latents_stats.pt                          mean, std (1, L, 1, 1): what training normalises by
    DIR/manifest.json                             which tokenizer, corpus and crop: ours alone, a public store has none

    store = LatentStore("latents/vtp_l")
    store.shape, store.num_samples, store.num_classes       # (64, 16, 16), 1281167, 1000
    latents, labels = store.read([7, 3], [False, True])     # (2, 64, 16, 16) as stored, (2,); picture 3 mirrored

Files of ours hold `positions` too: where each picture stands in the corpus. By them, index i is the same picture
whatever number of ranks wrote the store. Nothing but labels and positions is held in memory: the wanted rows are read
(data/latents/rows.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from configs import UserError
from data.latents.files import FLIPPED, LATENTS, REMEDY, read_shard, read_statistics, shard_files
from data.latents.rows import LatentRows
from data.losses import StorageFails
from data.manifest import MANIFEST
from data.patience import Patience
from data.recent import Recent

_OPEN_FILES = 128  # kept open; the usual limit of a process is 1,024
_TRIES = 6  # of what storage fails, unless system.loader.tries says otherwise


class LatentStore:
    """The latents below `directory`, by index: 0, 1, ... num_samples - 1, in the order of the corpus.

    `mean` and `std` are (L,) float32, `labels` (num_samples,) int64, `notes` what the manifest says, empty for a public
    store. Raises UserError for a store that is missing, damaged or incomplete. What storage fails is asked for `tries`
    times (data/patience.py).
    """

    def __init__(self, directory: str | Path, tries: int = _TRIES) -> None:
        self.directory, self.patience = Path(directory), Patience(tries)
        self.notes = _read_manifest(self.directory)
        self._shards = [read_shard(path) for path in shard_files(self.directory)]
        first = self._shards[0]
        for shard in self._shards:
            if (shard.shape, shard.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{shard.path} holds latents {shard.shape} in {shard.dtype}, {first.path.name} {first.shape} in "
                    f"{first.dtype}: files of one store are alike; {REMEDY}"
                )
        self.shape: tuple[int, int, int] = first.shape  # type: ignore[assignment]
        self.dtype = first.dtype
        self.has_flips = all(shard.has_flips for shard in self._shards)
        self.mean, self.std = read_statistics(self.directory, self.shape[0])
        self.labels = torch.cat([shard.labels for shard in self._shards])
        counts = [len(shard.labels) for shard in self._shards]
        self._files: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._rows: NDArray[np.int64] = np.concatenate([np.arange(count) for count in counts])
        self._sort()
        keys = (LATENTS, FLIPPED) if self.has_flips else (LATENTS,)
        self._open = Recent(lambda file_idx: LatentRows(self._shards[file_idx], keys), _OPEN_FILES)

    @property
    def num_samples(self) -> int:
        """Pictures, each of which has one latent as it is and one mirrored."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """One more than the highest label."""
        return int(self.labels.max()) + 1

    @property
    def tokenizer(self) -> str | None:
        """The digest (model.weights.digest) of the tokenizer that made the latents; None where nobody wrote it down."""
        return self.notes.get("arguments", {}).get("tokenizer")

    def read(self, indices: ArrayLike, flipped: ArrayLike) -> tuple[Tensor, Tensor]:
        """(n,) indices and flags -> (n, L, h, w) as stored, not normalised, and (n,) int64 labels.

        Raises UserError where mirrored latents are asked for and the store has none, and for a file that is gone or
        not what it was at the start; StorageFails where storage does not answer.
        """
        idx, is_flipped = np.asarray(indices, np.int64), np.asarray(flipped, bool)
        if is_flipped.any() and not self.has_flips:
            raise UserError(f"{self.directory} holds no {FLIPPED}: train without flips, or {REMEDY}")
        latents = torch.empty(len(idx), *self.shape, dtype=self.dtype)
        rows = latents.flatten(1).view(torch.uint8).numpy()  # the same memory
        for place in np.argsort(self._files[idx], kind="stable"):  # file by file, so that each is opened once
            file_idx, row = int(self._files[idx[place]]), int(self._rows[idx[place]])
            key = FLIPPED if is_flipped[place] else LATENTS
            rows[place] = np.frombuffer(self._row(file_idx, key, row), np.uint8)
        return latents, self.labels[idx]

    def _sort(self) -> None:
        """Brings indices into the corpus's order, where the files say it."""
        positions = [shard.positions for shard in self._shards if shard.positions is not None]
        if len(positions) == len(self._shards):
            order = np.argsort(torch.cat(positions).numpy(), kind="stable")
            self._files, self._rows, self.labels = self._files[order], self._rows[order], self.labels[order]

    def _row(self, file_idx: int, key: str, row: int) -> bytes:
        path = self._shards[file_idx].path
        try:
            return self.patience(lambda: self._read(file_idx, key, row))
        except FileNotFoundError:
            raise UserError(
                f"{path} is gone since the start: a store stays as it is while a run reads it; put the file back and "
                f"go on with --resume, or {REMEDY}"
            ) from None
        except OSError as error:
            raise StorageFails(
                f"{path} cannot be read ({error}), tried system.loader.tries={self.patience.tries} times: storage does "
                "not answer; when it does again, go on with --resume"
            ) from error

    def _read(self, file_idx: int, key: str, row: int) -> bytes:
        try:
            return self._open(file_idx).read(key, row)
        except OSError:
            self._open.drop(file_idx)  # a handle can be what is broken
            raise


def _read_manifest(directory: Path) -> dict[str, Any]:
    """What the manifest says; {} without one. Raises UserError where a file it lists is not there."""
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
            raise UserError(f"{directory / name} is missing or cut short, says {MANIFEST}; {REMEDY}")
    return notes
