"""Rows of one latent file, read where they lie in it.

    rows = LatentRows(shard, ("latents", "latents_flip"))
    rows.read("latents", 17)                 # the bytes of one latent, (L, h, w) in the file's type

Not mapped into memory: of a mapped file whose end is gone, the first look at a lost page ends the process without a
word (SIGBUS). A read that comes back short can be told. Source of the layout: the safetensors format, eight bytes of
length, a JSON header with the place of every tensor, then their bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from configs import UserError
from data.latents.files import REMEDY, Shard
from data.storage import OpenFile

_LENGTH_BYTES = 8


class LatentRows:
    """An open file that is still what `shard` says. Raises OSError, and UserError where it is another file or short."""

    def __init__(self, shard: Shard, keys: Sequence[str]) -> None:
        self._shard, self._file = shard, OpenFile(shard.path)
        count = len(shard.labels)
        self._row_bytes = math.prod(shard.shape) * shard.dtype.itemsize
        header_bytes = int.from_bytes(self._bytes(_LENGTH_BYTES, 0), "little")
        text = self._bytes(header_bytes, _LENGTH_BYTES)
        try:
            header = json.loads(text)
            places = {key: [int(end) for end in header[key]["data_offsets"]] for key in keys}
            shapes = [tuple(header[key]["shape"]) for key in keys]
        except (ValueError, KeyError, TypeError):
            raise self._changed("its header is none") from None
        if any(shape != (count, *shard.shape) for shape in shapes):
            raise self._changed(f"it holds {shapes[0]}")
        if any(end - begin != count * self._row_bytes for begin, end in places.values()):
            raise self._changed("its latents are of another type")
        self._begins = {key: _LENGTH_BYTES + header_bytes + begin for key, (begin, _) in places.items()}

    def read(self, key: str, row: int) -> bytes:
        """The bytes of one latent."""
        return self._bytes(self._row_bytes, self._begins[key] + row * self._row_bytes)

    def _bytes(self, num_bytes: int, offset: int) -> bytes:
        found = self._file.read(num_bytes, offset)
        if len(found) != num_bytes:
            raise self._changed(f"it ends at byte {offset + len(found):,} where {offset + num_bytes:,} are needed")
        return found

    def _changed(self, found: str) -> UserError:
        shard = self._shard
        return UserError(
            f"{shard.path} is not what it was at the start, {len(shard.labels)} latents of {shard.shape} in "
            f"{shard.dtype}: {found}; a store stays as it is while a run reads it: put the file back and go on with "
            f"--resume, or {REMEDY}"
        )
