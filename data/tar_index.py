"""Shard indexes: where each sample's bytes lie in its tar, kept in a sidecar file; the last ones stay in memory.

    indexes = ShardIndexes(["corpus/00000.tar"], "txt", ShardStorage(), cache_dir=None, num_open=64)
    indexes.count(0)                 # (1000, Counter({"missing caption": 3})), mostly without reading the index
    indexes.load(0).key(17)          # "00000/000000017"

The file format is DALI's `wds2idx` v1.2, so one file serves this loader and DALI's own webdataset reader. With one
sample of a 12 kB image and a 30-byte caption:

    v1.2 1
    jpg 512 12000 000000000.jpg txt 13312 30 000000000.txt
    # {"crc32": [..., ...], "of": {"tar_bytes": 20480, ..., "set_aside": [["000000001", "empty image"]], "usable": ...}}

DALI reads as many lines as the first one says; the last line, the trailer, is ours. It shows that an index is stale
(tar_bytes, tar_mtime_ns, and the version of the rules by which members are grouped into samples) and has the counts of
a shard at the file's end, so that opening thousands of shards does not parse them. Its checksums, of the lines above
and of itself, make a damaged index visible: it is built again. Every member has an offset of its own: those of a sample
need not be adjacent.

White space and % in names are written as %20 and so on, because DALI separates fields by spaces. After the name of a
hard link follow %00 and the name of the member that holds its bytes.

An index is written beside its shard, or into the cache directory where that is not writable. Where neither is, it is
kept compressed in memory: some 20 bytes a sample, 256 MiB at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from configs import UserError
from data import remote
from data.durable_files import write_atomic
from data.image_headers import IMAGE_EXTS
from data.storage import LruCache, ShardStorage
from data.tar_headers import BLOCK
from data.tar_samples import TarListing, TarMember, find_extension, image_of, key_of, scan_tar

_VERSION = "v1.2"
_RULES_VERSION = f"2 {' '.join(IMAGE_EXTS)}"  # of tar_samples.py: an index of another version is built again
_TAIL_BYTES = 1 << 14
_MTIME_TOLERANCE_NS = 2 * 10**9  # file systems round times, by up to 2 s
_INDEX_TRIES = 2  # of fetching a remote index, which is optional
_MAX_PACKED_BYTES = 1 << 28  # of indexes in memory; beyond, the oldest are dropped and built again when needed


class DamagedIndex(ValueError):
    """An index file that is not as it was written."""


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one shard, as index lines: parsed when read, a sixth of the memory."""

    name: str
    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # (key, reason) of what was left out
    tar_bytes: int

    def __len__(self) -> int:
        return len(self.lines)

    def members(self, sample_idx: int) -> tuple[TarMember, ...]:
        """Return the sample's members: an image among them, and all inside the tar. Raises DamagedIndex."""
        members = parse_line(self.lines[sample_idx])
        image_of(members)
        if any(m.offset < BLOCK or m.size < 0 or m.offset + m.size > self.tar_bytes for m in members):
            raise DamagedIndex(f"sample {sample_idx} of {self.name} lies outside its tar")
        return members

    def key(self, sample_idx: int) -> str:
        """Return the key of a sample, "shard/sample"."""
        return f"{self.name}/{key_of(self.members(sample_idx))}"


@dataclass(frozen=True)
class StoredIndex:
    """An index in the file `path`, or compressed in memory (`packed`)."""

    trailer: dict[str, Any]
    path: Path | None
    packed: bytes = b""

    def content(self) -> bytes:
        """Return the bytes of the index file. Raises DamagedIndex where it is missing."""
        if self.path is None:
            return zlib.decompress(self.packed)
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise DamagedIndex(f"{self.path} is missing") from None


@dataclass(frozen=True)
class UsableSamples:
    """The samples of a shard for one caption extension: usable ones as index lines, bad ones as (key, reason)."""

    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


class ShardIndexes:
    """The indexes of the shards `names`, by number; the last `num_open` stay in memory. Thread-safe.

    Builds those that are missing, stale or damaged. Raises OSError, FileNotFoundError for a missing shard, and
    UserError for one that is no tar.
    """

    def __init__(
        self,
        names: Sequence[str],
        caption_ext: str | None,
        storage: ShardStorage,
        cache_dir: str | Path | None,
        num_open: int,
    ) -> None:
        self._names, self._caption_ext, self._storage, self._cache_dir = names, caption_ext, storage, cache_dir
        self.labels = _labels(names)
        self._loaded = LruCache(self._load, num_open)
        self._rebuilt: dict[int, StoredIndex] = {}  # built by this process: in memory, or replacing a wrong one
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
        path = self._stored_index(shard_idx).path
        return path and path.parent

    def load(self, shard_idx: int) -> ShardIndex:
        """Return the index of a shard, as it was when it was last opened."""
        return self._loaded(shard_idx)

    def renew(self, shard_idx: int) -> None:
        """Index a shard again that does not match its index, once for each state of the file."""
        tar = self._storage.fetch(self._names[shard_idx])
        with self._renew_lock:
            state = _file_state(tar)
            last_state, error = self._renewed.get(shard_idx, (None, None))
            if last_state != state or (error is None and shard_idx not in self._rebuilt):
                try:
                    error = None
                    self._add_rebuilt(shard_idx, _build_index(tar, self._cache_dir))
                except UserError as no_tar:
                    error = no_tar
                self._renewed[shard_idx] = (state, error)
        self._loaded.drop(shard_idx)
        if error is not None:
            raise error

    def count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """Return (usable samples, bad samples by reason), from the index's trailer where it has them."""
        counted = self._stored_index(shard_idx).trailer["usable"].get(self._caption_ext or "")
        if counted is None:
            index = self.load(shard_idx)
            return len(index), Counter(reason for _, reason in index.bad)
        return counted[0], Counter(counted[1])

    def caption_exts(self, shard_idx: int) -> list[str]:
        """Return the member extensions that may hold captions, the most frequent first. Raises as `load` does."""
        return [ext for ext in self._stored_index(shard_idx).trailer["usable"] if ext]

    def _load(self, shard_idx: int) -> ShardIndex:
        stored = self._stored_index(shard_idx)
        try:
            usable = read_index(stored.content(), self._caption_ext)
        except DamagedIndex:
            stored = self._add_rebuilt(
                shard_idx, _build_index(self._storage.fetch(self._names[shard_idx]), self._cache_dir)
            )
            usable = read_index(stored.content(), self._caption_ext)
        return ShardIndex(self.labels[shard_idx], usable.lines, usable.bad, stored.trailer["tar_bytes"])

    def _stored_index(self, shard_idx: int) -> StoredIndex:
        name = self._names[shard_idx]
        if not remote.is_remote(name):
            return self._local_index(shard_idx)
        was_copied = self._storage.is_copied(name)
        may_be_remote = not was_copied and shard_idx not in self._rebuilt
        if may_be_remote and (found := self._remote_index(name)):
            return StoredIndex(found[1], found[0])
        try:
            return self._local_index(shard_idx)
        except UserError as error:
            if not was_copied:
                raise UserError(f"{name}: {error}") from None
        self._storage.forget(name)  # the cached copy is not a tar
        return self._stored_index(shard_idx)

    def _local_index(self, shard_idx: int) -> StoredIndex:
        """Return the index of a local shard, or of the copy of a remote one."""
        tar, rebuilt = self._storage.fetch(self._names[shard_idx]), self._rebuilt.get(shard_idx)
        if rebuilt is not None and matches_tar(rebuilt.trailer, tar.stat()):
            return rebuilt
        stored = ensure_index(tar, self._cache_dir)
        if stored.path is None:
            self._add_rebuilt(shard_idx, stored)
        return stored

    def _add_rebuilt(self, shard_idx: int, stored: StoredIndex) -> StoredIndex:
        with self._rebuilt_lock:
            previous = self._rebuilt.pop(shard_idx, None)
            self._rebuilt[shard_idx] = stored
            self._packed_bytes += len(stored.packed) - (len(previous.packed) if previous else 0)
            while self._packed_bytes > _MAX_PACKED_BYTES and len(self._rebuilt) > 1:
                self._packed_bytes -= len(self._rebuilt.pop(next(iter(self._rebuilt))).packed)
        return stored

    def _remote_index(self, name: str) -> tuple[Path, dict] | None:
        """Read the .idx beside a remote shard, which spares downloading the shard before its first sample is read.

        None where there is none, the server refuses it, or sends a page instead.
        """
        if (index_name := remote.remote_index_name(name)) is None:
            return None
        try:
            path = self._storage.fetch(index_name)
        except (FileNotFoundError, PermissionError):
            return None
        except OSError:  # the shard is readable without it: one more try, then it is indexed from its copy
            self._index_failures[name] += 1
            if self._index_failures[name] < _INDEX_TRIES:
                raise
            return None
        trailer = read_trailer(path, None)
        if trailer is None or remote.remote_version(name).size not in (None, trailer["tar_bytes"]):
            return None
        return path, trailer


def _labels(names: Sequence[str]) -> list[str]:
    """Return short shard names for keys: the stems, or where stems repeat the paths below the common directory."""
    paths = [remote.strip_query(name) for name in names]
    stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    if len({os.path.isabs(path) for path in paths}) == 1:
        common = os.path.commonpath(paths)
        below = [os.path.relpath(path, common).removesuffix(".tar") for path in paths]
        if len(set(below)) == len(below):
            return below
    return [name.removesuffix(".tar") for name in names]  # absolute and relative ones, or equal but for a query


def _file_state(tar: Path) -> tuple[int, ...]:
    status = tar.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def ensure_index(tar: Path, cache_dir: str | Path | None = None) -> StoredIndex:
    """Return the index of a local tar; build it where it is missing, stale or foreign."""
    for path in _candidate_paths(tar, cache_dir):
        if trailer := read_trailer(path, tar):
            return StoredIndex(trailer, path)
    return _build_index(tar, cache_dir)


def _build_index(tar: Path, cache_dir: str | Path | None) -> StoredIndex:
    """Index a local tar; write the index to the first writable path, or keep it in memory."""
    status = tar.stat()
    content, trailer = serialise_index(scan_tar(tar), status)
    for path in _candidate_paths(tar, cache_dir):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, is_synced=False)
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


def serialise_index(listing: TarListing, tar: os.stat_result) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of an index file, and its trailer.

    `tar` is the shard's status before the scan, so that the index of one that grows meanwhile is stale at once.
    """
    lines = [" ".join(f"{_quote(m.ext)} {m.offset} {m.size} {_quoted_name(m)}" for m in s) for s in listing.samples]
    counts = {ext: _usable_samples(lines, listing.set_aside, ext or None) for ext in ["", *_caption_exts(listing)]}
    trailer = {
        "rules": _RULES_VERSION,
        "tar_bytes": tar.st_size,
        "tar_mtime_ns": tar.st_mtime_ns,
        "set_aside": listing.set_aside,
        "usable": {ext: [len(u.lines), Counter(reason for _, reason in u.bad)] for ext, u in counts.items()},
    }
    text = "".join(f"{line}\n" for line in (f"{_VERSION} {len(lines)}", *lines)).encode(errors="surrogateescape")
    last = {"crc32": [zlib.crc32(text), _crc32_of(trailer)], "of": trailer}
    return text + f"# {json.dumps(last)}\n".encode(), trailer


def read_index(content: bytes, caption_ext: str | None) -> UsableSamples:
    """Parse an index file; `caption_ext` None: no caption is needed. Raises DamagedIndex."""
    text, mark, last = content.rpartition(b"\n# ")
    last_line = _last_line(last)
    if not mark or last_line is None or zlib.crc32(text + b"\n") != last_line["crc32"][0]:
        raise DamagedIndex("the index does not match its checksum")
    lines = text.decode(errors="surrogateescape").split("\n")[1:]
    try:
        return _usable_samples(lines, last_line["of"]["set_aside"], caption_ext)
    except (ValueError, IndexError):
        raise DamagedIndex("the index has malformed lines") from None


def read_trailer(path: Path, tar: Path | None) -> dict[str, Any] | None:
    """Read the trailer of an index file; None where it is missing, foreign, damaged, or does not match the tar.

    It does not match a tar of another size or time, or one that is later than the index file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            if b"\n# " not in tail:  # a long list of bad samples
                file.seek(0)
                tail = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        return None
    _, mark, last = tail.rpartition(b"\n# ")
    last_line = _last_line(last) if mark else None
    if last_line is None:
        return None
    trailer: dict[str, Any] = last_line["of"]
    if tar is not None:
        status = tar.stat()
        return trailer if matches_tar(trailer, status) and status.st_mtime_ns <= path.stat().st_mtime_ns else None
    return trailer


def matches_tar(trailer: dict[str, Any], tar: os.stat_result) -> bool:
    """Whether an index was built from a tar of this size and time."""
    apart_ns = abs(tar.st_mtime_ns - trailer["tar_mtime_ns"])
    return bool(tar.st_size == trailer["tar_bytes"] and apart_ns <= _MTIME_TOLERANCE_NS)


def parse_line(line: str) -> tuple[TarMember, ...]:
    """Parse the members of a sample from its index line. Raises DamagedIndex where it is malformed."""
    try:
        fields = zip(*[iter(line.split(" "))] * 4, strict=True)
        return tuple(
            TarMember(_unquote(ext), int(offset), int(size), *_unquote(name).split("\0", 1))
            for ext, offset, size, name in fields
        )
    except ValueError:
        raise DamagedIndex(f"not a line of an index: {line[:80]!r}") from None


def _usable_samples(
    lines: Sequence[str], set_aside: Iterable[tuple[str, str]], caption_ext: str | None
) -> UsableSamples:
    bad = [(key, reason) for key, reason in set_aside]
    if caption_ext is None:
        return UsableSamples(tuple(lines), tuple(bad))
    kept = []
    wanted = _quote(caption_ext)
    for line in lines:
        fields = line.split(" ")
        exts, sizes = fields[::4], fields[2::4]
        if len(fields) % 4:
            raise DamagedIndex(f"not a line of an index: {line[:80]!r}")
        idx = find_extension(exts, wanted)
        if idx is not None and sizes[idx] != "0":
            kept.append(line)
        else:
            bad.append((key_of(parse_line(line)), "missing caption" if idx is None else "empty caption"))
    return UsableSamples(tuple(kept), tuple(bad))


def _caption_exts(listing: TarListing) -> list[str]:
    """Return the commonest extensions that captions could have; others are counted when they are requested."""
    found = Counter(m.ext for sample in listing.samples[:64] for m in sample if m.ext not in IMAGE_EXTS)
    return [ext for ext, _ in found.most_common(8)]


def _last_line(line: bytes) -> dict[str, Any] | None:
    """Parse the last line without its `# `; None for an incomplete or foreign one."""
    try:
        last = json.loads(line) if line.endswith(b"}\n") else None
        if not isinstance(last, dict) or last["crc32"][1] != _crc32_of(last["of"]) or not _is_trailer(last["of"]):
            return None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    return last


def _crc32_of(trailer: object) -> int:
    return zlib.crc32(json.dumps(trailer).encode())


def _is_trailer(trailer: Any) -> bool:
    """Whether a trailer has the right fields: a foreign index may have right checksums and any content."""
    set_aside, usable = trailer["set_aside"], trailer["usable"]
    return (
        trailer["rules"] == _RULES_VERSION
        and _is_count(trailer["tar_bytes"])
        and type(trailer["tar_mtime_ns"]) is int
        and all(isinstance(text, str) for key, reason in set_aside for text in (key, reason))
        and all(_is_count(kept) and all(map(_is_count, bad.values())) for kept, bad in usable.values())
    )


def _is_count(value: object) -> bool:
    """Whether a value is 0, 1, 2 ... and fits 64 bits; True is not."""
    return type(value) is int and 0 <= value < 2**63


def _quoted_name(member: TarMember) -> str:
    return _quote(f"{member.name}\0{member.stored_as}" if member.stored_as else member.name)


def _quote(text: str) -> str:
    return re.sub(r"[\s%\0]", lambda match: quote(match[0]), text)


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape") if "%" in text else text
