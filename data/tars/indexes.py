"""The indexes of a corpus's shards: found, written where they are missing, stale or damaged, and the last ones kept.

    indexes = Indexes(["corpus/00000.tar"], "txt", Disk(), cache_dir=None, most=64)
    indexes.count(0)                 # (1000, Counter({"missing caption": 3})), mostly without reading the index
    indexes.of(0).key(17)            # "00000/000000017"

An index lies beside its shard, or in the cache directory where that cannot be written.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError
from data import remote, storage
from data.recent import Recent
from data.tars import sidecar
from data.tars.headers import BLOCK
from data.tars.listing import Member, image_of, key_of, scan


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one shard, as lines of its sidecar: parsed when read, a sixth of the memory."""

    name: str
    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # (key, reason) of what was left out
    tar_bytes: int

    def __len__(self) -> int:
        return len(self.lines)

    def members(self, sample_idx: int) -> tuple[Member, ...]:
        """Where the sample's bytes lie: a picture among them, and all inside the tar. Raises sidecar.Damaged."""
        members = sidecar.parse(self.lines[sample_idx])
        image_of(members)
        if any(m.offset < BLOCK or m.size < 0 or m.offset + m.size > self.tar_bytes for m in members):
            raise sidecar.Damaged(f"sample {sample_idx} of {self.name} lies outside its tar")
        return members

    def key(self, sample_idx: int) -> str:
        """The name of a sample, as Sample.key has it."""
        return f"{self.name}/{key_of(self.members(sample_idx)[0].name)}"


class Indexes:
    """By number of the shard in `names`; the last `most` are kept. Thread-safe. Raises OSError, FileNotFoundError for a
    shard that is not there, and UserError for one that is no tar."""

    def __init__(
        self,
        names: Sequence[str],
        caption_ext: str | None,
        disk: storage.Disk,
        cache_dir: str | Path | None,
        most: int,
    ) -> None:
        self._names, self._caption_ext, self._disk, self._cache_dir = names, caption_ext, disk, cache_dir
        self.labels = _labels(names)
        self._kept = Recent(self._load, most)

    def of(self, shard_idx: int) -> ShardIndex:
        """The index of a shard as it is, or as it was when it was last looked at."""
        return self._kept(shard_idx)

    def forget(self, shard_idx: int) -> None:
        """The next look is at the shard as it is then."""
        self._kept.drop(shard_idx)

    def count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """(usable samples, bad samples by reason), from the sidecar's last line where it knows."""
        _, trailer = self._sidecar(shard_idx)
        counted = trailer["usable"].get(self._caption_ext or "")
        if counted is None:
            index = self.of(shard_idx)
            return len(index), Counter(reason for _, reason in index.bad)
        return counted[0], Counter(counted[1])

    def _load(self, shard_idx: int) -> ShardIndex:
        path, trailer = self._sidecar(shard_idx)
        try:
            usable = sidecar.read(path, self._caption_ext)
        except sidecar.Damaged:
            path.unlink(missing_ok=True)
            path, trailer = ensure_sidecar(self._disk.fetch(self._names[shard_idx]), self._cache_dir)
            usable = sidecar.read(path, self._caption_ext)
        return ShardIndex(self.labels[shard_idx], usable.lines, usable.bad, trailer["tar_bytes"])

    def _sidecar(self, shard_idx: int) -> tuple[Path, dict]:
        name = self._names[shard_idx]
        if not remote.is_remote(name):
            return ensure_sidecar(self._disk.fetch(name), self._cache_dir)
        was_copied = self._disk.is_copied(name)
        if not was_copied and (found := self._remote_sidecar(name)):
            return found
        try:
            return ensure_sidecar(self._disk.fetch(name), self._cache_dir)
        except UserError as error:
            if not was_copied:
                raise UserError(f"{name}: {error}") from None
        self._disk.forget(name)  # what some trouble once left in the cache is no tar
        return self._sidecar(shard_idx)

    def _remote_sidecar(self, name: str) -> tuple[Path, dict] | None:
        """The .idx lying beside a remote shard spares copying the shard before its first sample is wanted.

        Nobody need have put one there: a server that refuses it, or sends a page instead, has none.
        """
        if (index_name := remote.index_name(name)) is None:
            return None
        try:
            path = self._disk.fetch(index_name)
        except (FileNotFoundError, PermissionError):
            return None
        trailer = sidecar.read_trailer(path, None)
        if trailer is None or remote.stat(name).size not in (None, trailer["tar_bytes"]):
            return None
        return path, trailer


def ensure_sidecar(tar: Path, cache_dir: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """(path, last line) of the sidecar of a local tar, written first when missing, stale or foreign."""
    beside = tar.with_suffix(".idx")
    elsewhere = _index_folder(cache_dir) / f"{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}.idx"
    for path in (beside, elsewhere):
        if trailer := sidecar.read_trailer(path, tar):
            return path, trailer
    path = beside if os.access(tar.parent, os.W_OK) else elsewhere
    path.parent.mkdir(parents=True, exist_ok=True)
    tar_bytes = tar.stat().st_size  # before the walk: of a shard that grows meanwhile the index is stale at once
    return path, sidecar.write(scan(tar), tar_bytes, path)


def _labels(names: Sequence[str]) -> list[str]:
    """Short shard names for keys: the stem, or where stems repeat the path below the common folder, if there is one."""
    paths = [remote.without_query(name) for name in names]
    stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    if len({os.path.isabs(path) for path in paths}) == 1:
        common = os.path.commonpath(paths)
        below = [os.path.relpath(path, common).removesuffix(".tar") for path in paths]
        if len(set(below)) == len(below):
            return below
    return [name.removesuffix(".tar") for name in names]  # absolute and relative ones, or told apart by a query alone


def _index_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path.home() / ".cache" / "vtp-engine" / "index"
