"""Small images and tar shards for the data tests.

write_tar(path, {"000.jpg": encoded(0), "000.txt": b"a red circle"})
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.tar_index import ensure_index


def drawn_image(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "JPEG", height: int = 24, width: int = 32, **options: Any) -> bytes:
    file = io.BytesIO()
    drawn_image(seed, height, width).save(file, kind, **options)
    return file.getvalue()


def huge_png(side: int = 60_000) -> bytes:
    """A few bytes that claim side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes | str]]) -> Path:
    """A tar of the members in order; a str instead of bytes makes a symbolic link to it."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_corpus(folder: Path, num_shards: int, per_shard: int, **size: int) -> None:
    """Shards 00000.tar ... of good samples with captions `sample N` and labels N mod 5."""
    folder.mkdir(exist_ok=True)
    for shard in range(num_shards):
        members: list[tuple[str, bytes]] = []
        for i in range(shard * per_shard, (shard + 1) * per_shard):
            members += [(f"{i:06d}.jpg", encoded(i, **size)), (f"{i:06d}.txt", b"sample %d" % i)]
            members.append((f"{i:06d}.json", b'{"label": %d, "alt": "json %d"}' % (i % 5, i)))
        write_tar(folder / f"{shard:05d}.tar", members)


def index_of(tar: Path) -> Path:
    """Return the path of a shard's index file, building it where it is missing."""
    path = ensure_index(tar).path
    assert path is not None
    return path


class LetterEncoder:
    """Captions to the codes of their letters."""

    def encode(self, captions: list[str]) -> torch.Tensor:
        ids = torch.zeros(len(captions), 12, dtype=torch.int64)
        for row, text in enumerate(captions):
            codes = torch.tensor([ord(letter) % 60 + 1 for letter in text[:11]] + [63])
            ids[row, : len(codes)] = codes
        return ids
