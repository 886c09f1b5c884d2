"""The indexes of a corpus's shards: found, written where they are missing, stale or damaged, and the last ones kept.

    indexes = Indexes(["corpus/00000.tar"], "txt", Disk(), cache_dir=None, most=64)
    indexes.count(0)                 # (1000, Counter({"missing caption": 3})), mostly without reading the index
    indexes.of(0).key(17)            # "00000/000000017"

An index is written beside its shard, or into the cache directory where that is not writable. Where neither is, it is
kept compressed in memory: some 20 bytes a sample, 256 MiB at most.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError
from data import remote, storage
from data.recent import Recent
from data.tars import sidecar
from data.tars.headers import BLOCK
from data.tars.listing import Member, image_of, key_of, scan

_INDEX_TRIES = 2  # of an optional file
_MOST_PACKED_BYTES = 1 << 28  # of indexes in memory; beyond, the oldest are dropped and built again when needed


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
        return f"{self.name}/{key_of(self.members(sample_idx))}"


@dataclass(frozen=True)
class StoredIndex:
    """A sidecar in the file `path`, or compressed in memory (`packed`). `trailer` is its last line."""

    trailer: dict[str, Any]
    path: Path | None
    packed: bytes = b""

    def content(self) -> bytes:
        """Return the bytes of the sidecar. Raises sidecar.Damaged where its file is missing."""
        if self.path is None:
            return zlib.decompress(self.packed)
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise sidecar.Damaged(f"{self.path} is missing") from None


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
        self._rebuilt: dict[int, StoredIndex] = {}  # built by this process: kept in memory, or replacing a wrong one
        # State of each shard when it was last indexed again, and the error that this raised.
        self._renewed: dict[int, tuple[tuple[int, ...], UserError | None]] = {}
        self._renew_lock, self._rebuilt_lock = threading.Lock(), threading.Lock()
        self._packed_bytes = 0
        self._index_failures: Counter[str] = Counter()  # of fetching the .idx beside a remote shard

    @property
    def num_in_memory(self) -> int:
        """Number of indexes kept in memory because no directory is writable."""
        return sum(stored.path is None for stored in list(self._rebuilt.values()))

    def folder(self, shard_idx: int) -> Path | None:
        """Return the directory of a shard's index; None for one in memory."""
        path = self._sidecar(shard_idx).path
        return path and path.parent

    def of(self, shard_idx: int) -> ShardIndex:
        """The index of a shard as it is, or as it was when it was last looked at."""
        return self._kept(shard_idx)

    def renew(self, shard_idx: int) -> None:
        """Index a shard again that does not match its index, once for each state of the file."""
        tar = self._disk.fetch(self._names[shard_idx])
        with self._renew_lock:
            state = _file_state(tar)
            last_state, error = self._renewed.get(shard_idx, (None, None))
            if last_state != state or (error is None and shard_idx not in self._rebuilt):
                try:
                    error = None
                    self._keep_rebuilt(shard_idx, _build(tar, self._cache_dir))
                except UserError as no_tar:
                    error = no_tar
                self._renewed[shard_idx] = (state, error)
        self._kept.drop(shard_idx)
        if error is not None:
            raise error

    def count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """(usable samples, bad samples by reason), from the sidecar's last line where it knows."""
        counted = self._sidecar(shard_idx).trailer["usable"].get(self._caption_ext or "")
        if counted is None:
            index = self.of(shard_idx)
            return len(index), Counter(reason for _, reason in index.bad)
        return counted[0], Counter(counted[1])

    def caption_exts(self, shard_idx: int) -> list[str]:
        """Return the member extensions that may hold captions, the most frequent first. Raises as `of` does."""
        return [ext for ext in self._sidecar(shard_idx).trailer["usable"] if ext]

    def _load(self, shard_idx: int) -> ShardIndex:
        stored = self._sidecar(shard_idx)
        try:
            usable = sidecar.read(stored.content(), self._caption_ext)
        except sidecar.Damaged:
            stored = self._keep_rebuilt(shard_idx, _build(self._disk.fetch(self._names[shard_idx]), self._cache_dir))
            usable = sidecar.read(stored.content(), self._caption_ext)
        return ShardIndex(self.labels[shard_idx], usable.lines, usable.bad, stored.trailer["tar_bytes"])

    def _sidecar(self, shard_idx: int) -> StoredIndex:
        name = self._names[shard_idx]
        if not remote.is_remote(name):
            return self._local_sidecar(shard_idx)
        was_copied = self._disk.is_copied(name)
        may_be_remote = not was_copied and shard_idx not in self._rebuilt
        if may_be_remote and (found := self._remote_sidecar(name)):
            return StoredIndex(found[1], found[0])
        try:
            return self._local_sidecar(shard_idx)
        except UserError as error:
            if not was_copied:
                raise UserError(f"{name}: {error}") from None
        self._disk.forget(name)  # the cached copy is not a tar
        return self._sidecar(shard_idx)

    def _local_sidecar(self, shard_idx: int) -> StoredIndex:
        """Return the index of a local shard, or of the copy of a remote one."""
        tar, rebuilt = self._disk.fetch(self._names[shard_idx]), self._rebuilt.get(shard_idx)
        if rebuilt is not None and sidecar.matches_tar(rebuilt.trailer, tar.stat()):
            return rebuilt
        stored = ensure_sidecar(tar, self._cache_dir)
        if stored.path is None:
            self._keep_rebuilt(shard_idx, stored)
        return stored

    def _keep_rebuilt(self, shard_idx: int, stored: StoredIndex) -> StoredIndex:
        with self._rebuilt_lock:
            before = self._rebuilt.pop(shard_idx, None)
            self._rebuilt[shard_idx] = stored
            self._packed_bytes += len(stored.packed) - (len(before.packed) if before else 0)
            while self._packed_bytes > _MOST_PACKED_BYTES and len(self._rebuilt) > 1:
                self._packed_bytes -= len(self._rebuilt.pop(next(iter(self._rebuilt))).packed)
        return stored

    def _remote_sidecar(self, name: str) -> tuple[Path, dict] | None:
        """Read the .idx beside a remote shard, which spares downloading the shard before its first sample is read.

        None where there is none, the server refuses it, or sends a page instead.
        """
        if (index_name := remote.index_name(name)) is None:
            return None
        try:
            path = self._disk.fetch(index_name)
        except (FileNotFoundError, PermissionError):
            return None
        except OSError:  # the shard is readable without it: one more try, then it is indexed from its copy
            self._index_failures[name] += 1
            if self._index_failures[name] < _INDEX_TRIES:
                raise
            return None
        trailer = sidecar.read_trailer(path, None)
        if trailer is None or remote.stat(name).size not in (None, trailer["tar_bytes"]):
            return None
        return path, trailer


def ensure_sidecar(tar: Path, cache_dir: str | Path | None = None) -> StoredIndex:
    """Return the sidecar of a local tar; build it where it is missing, stale or foreign."""
    for path in _candidate_paths(tar, cache_dir):
        if trailer := sidecar.read_trailer(path, tar):
            return StoredIndex(trailer, path)
    return _build(tar, cache_dir)


def _build(tar: Path, cache_dir: str | Path | None) -> StoredIndex:
    """Index a local tar; write the index to the first writable path, or keep it in memory."""
    status = tar.stat()
    content, trailer = sidecar.serialise(scan(tar), status)
    for path in _candidate_paths(tar, cache_dir):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sidecar.write(content, path)
        except OSError:
            continue
        return StoredIndex(trailer, path)
    return StoredIndex(trailer, None, zlib.compress(content, 1))


def _candidate_paths(tar: Path, cache_dir: str | Path | None) -> Iterator[Path]:
    """Yield the paths for the index of a tar: beside it, then under a hash of its path in the cache directory."""
    yield tar.with_suffix(".idx")
    home = os.path.expanduser("~")  # "~" or a relative path for a user without a home
    folder = Path(cache_dir) if cache_dir else Path(home) / ".cache" / "vtp-engine" / "index"
    if cache_dir or os.path.isabs(home):
        yield folder / f"{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}.idx"


def _file_state(tar: Path) -> tuple[int, ...]:
    status = tar.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _labels(names: Sequence[str]) -> list[str]:
    """Return short shard names for keys: the stems, or where stems repeat the paths below the common directory."""
    paths = [remote.without_query(name) for name in names]
    stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    if len({os.path.isabs(path) for path in paths}) == 1:
        common = os.path.commonpath(paths)
        below = [os.path.relpath(path, common).removesuffix(".tar") for path in paths]
        if len(set(below)) == len(below):
            return below
    return [name.removesuffix(".tar") for name in names]  # absolute and relative ones, or equal but for a query
