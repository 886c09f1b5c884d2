"""Tar shards as a random-access corpus: which samples there are, and the bytes of any of them.

Reads what img2dataset and webdataset write (`000000123.jpg` + `.txt` and/or `.json` in `00000.tar`). Each tar
is indexed once into a sidecar `00000.idx` beside it (data/sidecar.py), or in the cache directory where that
is not writable.

    python -m data.shards index DIR...           # beforehand, or the first run does it

    shards = Shards(expand(["corpus/*.tar"]), caption="txt")
    shards.sizes                                  # usable samples of each shard
    shards.read(3, 17).caption                    # "a red circle"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from configs import UserError
from data import sidecar, storage
from data.sidecar import Member

Exchange = Callable[[Any], list[Any]]
_OPEN_FILES = 128  # tar files kept open; the usual limit of a process is 1,024
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_INDEX_THREADS = 16  # opening many sidecars waits for the disk or the network


class BadCaption(ValueError):
    """The sample's caption cannot be read; the text is the reason that is counted."""


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one sample, not decoded."""

    key: str  # "shard/sample", unique in the corpus
    image: bytes  # the encoded picture
    caption: str  # empty when the corpus is read without captions


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one shard, as lines of its sidecar: parsed when read, a sixth of the memory."""

    name: str
    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # (key, reason) of what was left out

    def __len__(self) -> int:
        return len(self.lines)

    def members(self, sample_idx: int) -> tuple[Member, ...]:
        """Where the sample's bytes lie in the tar."""
        return sidecar.parse(self.lines[sample_idx])

    def key(self, sample_idx: int) -> str:
        """The name of a sample, as Sample.key has it."""
        return f"{self.name}/{sidecar.key_of(self.members(sample_idx)[0].name)}"


class Shards:
    """A corpus of shards. `caption` is a member extension, `json:KEY`, or None to read pictures alone.

    `open_indexes` indexes are kept in memory. With an `exchange`, which gives every rank's argument on every rank
    in order, rank r of W opens (and where needed indexes) the shards r, r + W ... only and learns the other
    counts from the others. Thread-safe. Raises UserError for a shard that is missing or no tar, on all ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        caption: str | None,
        cache_dir: str | Path | None = None,
        open_indexes: int = 64,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        self.names, self.caption, self.cache_dir = tuple(names), caption, cache_dir
        self._caption_ext = caption and caption.partition(":")[0]
        self._labels = _labels(self.names)
        self._descriptor = lru_cache(_OPEN_FILES)(self._open)
        self.index = lru_cache(open_indexes)(self._load_index)
        step = world_size if exchange else 1
        own = self._count_all(range(rank if exchange else 0, len(self.names), step))
        parts: list[Any] = exchange(own) if exchange else [own]
        for part in parts:
            if isinstance(part, UserError):
                raise part
        self.sizes = np.empty(len(self.names), np.int64)
        for start, (sizes, _) in enumerate(parts):
            self.sizes[start::step] = sizes
        self.bad: Counter[str] = sum((reasons for _, reasons in parts), Counter())

    def read(self, shard_idx: int, sample_idx: int) -> Sample:
        """The bytes of one sample. Raises BadCaption when its caption cannot be read."""
        index = self.index(shard_idx)
        members = index.members(sample_idx)
        image = self._bytes(shard_idx, sidecar.image_of(members))
        return Sample(index.key(sample_idx), image, self._caption(shard_idx, members))

    def field(self, shard_idx: int, sample_idx: int, key: str) -> object:
        """A field of the sample's .json member, or None when either is missing."""
        members = [m for m in self.index(shard_idx).members(sample_idx) if m.ext == "json"]
        return _json_field(self._bytes(shard_idx, members[0]), key) if members else None

    def label(self, shard_idx: int, sample_idx: int) -> int:
        """The class: field `label` of the .json member, else the .cls member; -1 where neither holds an integer.

        Raises BadCaption for a .json member that is none.
        """
        label = self.field(shard_idx, sample_idx, "label")
        if label is None:
            members = [m for m in self.index(shard_idx).members(sample_idx) if m.ext == "cls"]
            text = self._bytes(shard_idx, members[0]).decode(errors="replace").strip() if members else ""
            label = int(text) if _INTEGER.fullmatch(text) else -1
        return label if type(label) is int else -1

    def _caption(self, shard_idx: int, members: Sequence[Member]) -> str:
        if self.caption is None:
            return ""
        data = self._bytes(shard_idx, next(m for m in members if m.ext == self._caption_ext))
        key = self.caption.partition(":")[2]
        text = _json_field(data, key) if key else data.decode(errors="replace")
        if text is None:
            raise BadCaption("missing caption")
        if not isinstance(text, str) or not text.strip():
            raise BadCaption("empty caption")
        return text.strip()

    def _bytes(self, shard_idx: int, member: Member) -> bytes:
        descriptor = self._descriptor(shard_idx)  # held for the read: its last owner closes the file
        data = os.pread(descriptor.number, member.size, member.offset)
        if len(data) != member.size:
            raise UserError(
                f"{self.names[shard_idx]} gives {len(data)} of {member.size} bytes at {member.offset}: it "
                "changed since it was indexed; leave shards alone during a run, or remove its .idx"
            )
        return data

    def _open(self, shard_idx: int) -> _Descriptor:
        return _Descriptor(self._fetch(self.names[shard_idx]))

    def _fetch(self, name: str) -> Path:
        try:
            return storage.fetch(name, self.cache_dir)
        except FileNotFoundError:
            raise UserError(
                f"{name} does not exist: every named shard must; correct the pattern or upload it"
            ) from None

    def _count_all(self, shards: Sequence[int]) -> tuple[list[int], Counter[str]] | UserError:
        """(usable samples of each shard, bad samples by reason); an error is a result, to be told to all ranks."""
        try:
            with ThreadPoolExecutor(_INDEX_THREADS) as pool:
                counts = list(pool.map(self._count, shards))
        except UserError as error:
            return error
        return [count for count, _ in counts], sum((reasons for _, reasons in counts), Counter())

    def _count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """(usable samples, bad samples by reason), from the sidecar's last line where it knows."""
        _, trailer = self._sidecar(shard_idx)
        counted = trailer["usable"].get(self._caption_ext or "")
        if counted is None:
            index = self.index(shard_idx)
            return len(index), Counter(reason for _, reason in index.bad)
        return counted[0], Counter(counted[1])

    def _load_index(self, shard_idx: int) -> ShardIndex:
        usable = sidecar.read(self._sidecar(shard_idx)[0], self._caption_ext)
        return ShardIndex(self._labels[shard_idx], usable.lines, usable.bad)

    def _sidecar(self, shard_idx: int) -> tuple[Path, dict]:
        name = self.names[shard_idx]
        if storage.is_remote(name) and (found := self._remote_sidecar(name)):
            return found
        return ensure_sidecar(self._fetch(name), self.cache_dir)

    def _remote_sidecar(self, name: str) -> tuple[Path, dict] | None:
        """The .idx lying beside a remote shard spares copying the shard before its first sample is wanted."""
        try:
            path = storage.fetch(name.removesuffix(".tar") + ".idx", self.cache_dir)
            trailer = sidecar.read_trailer(path, None, storage.remote_bytes(name))
        except FileNotFoundError:
            return None
        return (path, trailer) if trailer else None


def ensure_sidecar(tar: Path, cache_dir: str | Path | None = None) -> tuple[Path, dict]:
    """(path, last line) of the sidecar of a local tar, written first when missing, stale or foreign."""
    beside = tar.with_suffix(".idx")
    elsewhere = _index_folder(cache_dir) / f"{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}.idx"
    for path in (beside, elsewhere):
        if trailer := sidecar.read_trailer(path, tar):
            return path, trailer
    path = beside if os.access(tar.parent, os.W_OK) else elsewhere
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write(sidecar.scan(tar), tar.stat().st_size, path)
    trailer = sidecar.read_trailer(path, tar)
    assert trailer is not None, f"{path} was just written"
    return path, trailer


class _Descriptor:
    """A file open for pread; closed when its last reader lets go, so eviction never cuts a read short."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _labels(names: Sequence[str]) -> list[str]:
    """Short shard names for keys: the stem, or the path below the common folder where stems repeat."""
    stems = [os.path.basename(name).removesuffix(".tar") for name in names]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath(names)
    return [os.path.relpath(name, common).removesuffix(".tar") for name in names]


def _json_field(data: bytes, key: str) -> object:
    try:
        record = json.loads(data)
    except ValueError:
        raise BadCaption("corrupt json") from None
    return record.get(key) if isinstance(record, dict) else None


def _index_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path.home() / ".cache" / "vtp-engine" / "index"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m data.shards index DIR...`: writes sidecars, prints counts. Exit code 0, or 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m data.shards", description="Index tar shards for random access.")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="write X.idx for every X.tar and print what it holds")
    index.add_argument("dirs", nargs="+", metavar="DIR", help="directories, .tar files, globs or brace ranges")
    index.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="shards indexed at once (%(default)s)"
    )
    index.add_argument("--caption", default="txt", help="caption member: an extension or json:KEY (default: txt)")
    arguments = parser.parse_args(argv)
    try:
        names = storage.expand(arguments.dirs, key="DIR")
        processes = min(arguments.processes, len(names))
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(ensure_sidecar, map(Path, names)))
        shards = Shards(names, arguments.caption)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for shard_idx, name in enumerate(shards.names):
        bad = Counter(reason for _, reason in shards.index(shard_idx).bad)
        print(f"{name}: {shards.sizes[shard_idx]} samples{_reasons(bad)}")
    print(f"{len(shards.names)} shards, {shards.sizes.sum()} samples{_reasons(shards.bad)}")
    return 0


def _reasons(bad: Counter[str]) -> str:
    return f"; {bad.total()} bad: " + ", ".join(f"{n} {reason}" for reason, n in bad.most_common()) if bad else ""


if __name__ == "__main__":
    sys.exit(main())
