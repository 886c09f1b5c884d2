"""Files of a latent store: names and contents of each, and random access to single latents.

    latent_file_name(rank=0, number=12)            # "latents_rank00_shard012.safetensors"
    read_latent_file(path).shape                   # (64, 16, 16)

    rows = OpenLatentFile(file, ("latents", "latents_flip"))
    rows.read("latents", 17)                       # the bytes of one latent, (L, h, w) in the file's type

Source: extract_features.py and its data set class in github.com/hustvl/LightningDiT (arXiv 2501.01423).

Files are not mapped into memory: where the end of a mapped file is gone, the first access to a lost page kills the
process (SIGBUS). A short read can be detected. Source of the layout: the safetensors format, eight bytes of length, a
JSON header with the offsets of every tensor, then their bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs import UserError
from data.storage import OpenFile

LATENTS, FLIPPED, LABELS, POSITIONS = "latents", "latents_flip", "labels", "positions"
REMEDY = "write the store anew with `python -m evaluation.latents`"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class LatentFile:
    """One file: its header, labels and positions; the latents stay on the disk."""

    path: Path
    shape: tuple[int, ...]  # (L, h, w)
    dtype: torch.dtype
    has_flips: bool
    labels: Tensor  # (n,) int64
    positions: Tensor | None  # (n,) int64


def latent_file_name(rank: int, number: int) -> str:
    """Return the name that the public extraction gives to file `number` of a rank."""
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def list_latent_files(directory: Path) -> list[Path]:
    """List the latent files of a store, by rank and number. Raises UserError where there is none."""
    found = sorted(directory.glob("*.safetensors"), key=lambda path: _numbers(path.stem))
    if not found:
        raise UserError(
            f"{directory} holds no latents (no *.safetensors): write them with "
            f"`python -m evaluation.latents RUN --data SHARDS --out {directory}`"
        )
    return found


def read_latent_file(path: Path) -> LatentFile:
    """Read all but the latents. Raises UserError for a file that is cut off, lacks a tensor, or has unfit labels."""
    try:
        with safe_open(path, "pt") as stored:
            names = set(stored.keys())
            if missing := [key for key in (LATENTS, LABELS) if key not in names]:
                raise UserError(
                    f"{path} has no {' and no '.join(missing)} (it has {', '.join(sorted(names)[:5])}): a latent file "
                    f"holds {LATENTS}, {FLIPPED} and {LABELS}; {REMEDY}"
                )
            latents = stored.get_tensor(LATENTS)
            flips = stored.get_tensor(FLIPPED) if FLIPPED in names else None
            labels = stored.get_tensor(LABELS).long().clone()
            positions = stored.get_tensor(POSITIONS).clone() if POSITIONS in names else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or is cut off ({error}); {REMEDY}") from None
    same = latents.ndim == 4 and (flips is None or flips.shape == latents.shape) and labels.shape == latents.shape[:1]
    if not same or (labels < 0).any():
        raise UserError(
            f"{path}: {LATENTS} {tuple(latents.shape)}, {FLIPPED} {None if flips is None else tuple(flips.shape)}, "
            f"{LABELS} {tuple(labels.shape)} from {int(labels.min())} on: latents are (n, L, h, w), both alike, with a "
            f"label from 0 on for each; {REMEDY}"
        )
    return LatentFile(path, tuple(latents.shape[1:]), latents.dtype, flips is not None, labels, positions)


def _numbers(stem: str) -> list[int | str]:
    """Return a sort key that puts shard 2 before shard 10, and rank 99 before rank 100."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", stem)]


class OpenLatentFile:
    """An open latent file. Raises OSError, and UserError where it no longer matches `file`."""

    def __init__(self, file: LatentFile, keys: Sequence[str]) -> None:
        self._file, self._bytes = file, OpenFile(file.path)
        count = len(file.labels)
        self._row_bytes = math.prod(file.shape) * file.dtype.itemsize
        header_bytes = int.from_bytes(self._read_bytes(_LENGTH_BYTES, 0), "little")
        text = self._read_bytes(header_bytes, _LENGTH_BYTES)
        try:
            header = json.loads(text)
            offsets = {key: [int(end) for end in header[key]["data_offsets"]] for key in keys}
            shapes = [tuple(header[key]["shape"]) for key in keys]
        except (ValueError, KeyError, TypeError):
            raise self._changed("its header is unreadable") from None
        if any(shape != (count, *file.shape) for shape in shapes):
            raise self._changed(f"it holds {shapes[0]}")
        if any(end - begin != count * self._row_bytes for begin, end in offsets.values()):
            raise self._changed("its latents are of another type")
        self._begins = {key: _LENGTH_BYTES + header_bytes + begin for key, (begin, _) in offsets.items()}

    def read(self, key: str, row: int) -> bytes:
        """Read the bytes of one latent."""
        return self._read_bytes(self._row_bytes, self._begins[key] + row * self._row_bytes)

    def _read_bytes(self, num_bytes: int, offset: int) -> bytes:
        data = self._bytes.read(num_bytes, offset)
        if len(data) != num_bytes:
            raise self._changed(f"it ends at byte {offset + len(data):,} where {offset + num_bytes:,} are needed")
        return data

    def _changed(self, found: str) -> UserError:
        file = self._file
        return UserError(
            f"{file.path} is not what it was at the start, {len(file.labels)} latents of {file.shape} in "
            f"{file.dtype}: {found}; a store stays as it is while a run reads it: put the file back and go on with "
            f"--resume, or {REMEDY}"
        )
