"""Tar shards as a random-access corpus: which samples there are, and the bytes of any of them.

Reads what img2dataset and webdataset write (`000000123.jpg` + `.txt` and/or `.json` in `00000.tar`). Each tar
is indexed once into a sidecar `00000.idx` beside it (data/tars/sidecar.py), or in the cache directory where that
is not writable.

    python -m data.shards index DIR...           # beforehand, or the first run does it

    shards = Shards(expand(["corpus/*.tar"]), caption="txt")
    shards.sizes                                  # usable samples of each shard
    shards.read(3, 17).caption                    # "a red circle"
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs import UserError
from data import storage
from data.patience import Patience, Unreadable
from data.recent import Recent
from data.remote import NotAShard
from data.tars.headers import BLOCK
from data.tars.indexes import Indexes, ShardIndex, ensure_sidecar
from data.tars.listing import Member, image_of, is_header_of, key_of

Exchange = Callable[[Any], list[Any]]
T = TypeVar("T")
_OPEN_FILES = 128  # tar files kept open; the usual limit of a process is 1,024
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_INDEX_THREADS = 16  # opening many sidecars waits for the disk or the network
_STAYS = (FileNotFoundError, PermissionError, NotAShard)  # trying again would give the same
_TRIES = 6  # of what storage fails, unless system.loader.tries says otherwise: 31 s of waiting
# A caption may be megabytes long. No row of tokens holds more than a part of this: the rest is not even read.
_MOST_CAPTION_BYTES = 1 << 18
_MOST_JSON_BYTES = 1 << 22  # half of a record cannot be parsed: it is whole, or it is refused


class BadMember(ValueError):
    """What the shard holds of a sample is of no use; the text is the reason that is counted."""


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one sample, not decoded."""

    key: str  # "shard/sample", unique in the corpus
    image: bytes  # the encoded picture
    caption: str  # empty when the corpus is read without captions


class _Changed(Exception):
    """The shard is not what its index says."""


class Shards:
    """A corpus of shards. `caption` is a member extension, `json:KEY`, or None to read pictures alone.

    `open_indexes` indexes are kept in memory. With an `exchange`, which gives every rank's argument on every rank
    in order, rank r of W opens (and where needed indexes) the shards r, r + W ... only and learns the other
    counts from the others. Thread-safe. Raises UserError for a shard that is missing or no tar, on all ranks.

    With the `sizes` of an earlier opening nothing is looked at before it is read, and `bad` stays empty.

    What storage fails is asked for `tries` times (data/patience.py). Once the corpus is open, a shard that vanishes or
    fails costs its samples, which are Unreadable. One that changes is indexed anew: the order stays that of the
    sizes at the start, and a sample that is no longer there is Unreadable too.
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
        tries: int = _TRIES,
        sizes: NDArray[np.int64] | None = None,
    ) -> None:
        self.names, self.caption = tuple(names), caption
        self.patience = Patience(tries)
        disk = storage.Disk(cache_dir)
        self._caption_ext = caption and caption.partition(":")[0]
        self._indexes = Indexes(self.names, self._caption_ext, disk, cache_dir, open_indexes)
        self._files = Recent(lambda shard_idx: disk.open(self.names[shard_idx]), _OPEN_FILES)
        self.bad: Counter[str] = Counter()
        if sizes is not None:
            self.sizes = sizes
            return
        step = world_size if exchange else 1
        own = self._count_all(range(rank if exchange else 0, len(self.names), step))
        parts: list[Any] = exchange(own) if exchange else [own]
        for part in parts:
            if isinstance(part, UserError):
                raise part
        self.sizes = np.empty(len(self.names), np.int64)
        for start, (sizes, _) in enumerate(parts):
            self.sizes[start::step] = sizes
        self.bad = sum((reasons for _, reasons in parts), Counter())

    def index(self, shard_idx: int) -> ShardIndex:
        """The index of a shard as it was when it was last looked at. Raises OSError, without trying twice."""
        return self._indexes.of(shard_idx)

    def read(self, shard_idx: int, sample_idx: int, most_image_bytes: int | None = None) -> Sample:
        """The bytes of one sample. Raises BadMember, and Unreadable where storage does not give them."""
        return self._patiently(shard_idx, lambda: self._read(shard_idx, sample_idx, most_image_bytes))

    def label(self, shard_idx: int, sample_idx: int) -> int:
        """The class: field `label` of the .json member, else the .cls member; -1 where neither holds an integer.

        Raises BadMember for a .json member that is none, and Unreadable.
        """
        return self._patiently(shard_idx, lambda: self._label(shard_idx, sample_idx))

    def field(self, shard_idx: int, sample_idx: int, key: str) -> object:
        """A field of the sample's .json member, or None when either is missing. Raises as `label` does."""
        return self._patiently(shard_idx, lambda: self._field(shard_idx, sample_idx, key))

    def key(self, shard_idx: int, sample_idx: int) -> str:
        """The name of a sample, as Sample.key has it; its number where the index cannot be read now."""
        try:
            return self.index(shard_idx).key(sample_idx)
        except (OSError, ValueError, IndexError):
            return f"{self._indexes.labels[shard_idx]}/#{sample_idx}"

    def _patiently(self, shard_idx: int, read: Callable[[], T]) -> T:
        """read(), tried again where storage fails, and once more with a new index where the shard has changed."""
        try:
            return self.patience(lambda: self._indexed_anew(shard_idx, read))
        except FileNotFoundError:
            raise Unreadable("vanished shard", is_waited_for=True, is_whole_shard=True) from None
        except OSError as error:
            raise Unreadable(
                "storage error", is_waited_for=True, is_whole_shard=not self._is_open(shard_idx)
            ) from error

    def _indexed_anew(self, shard_idx: int, read: Callable[[], T]) -> T:
        try:
            return read()
        except OSError:
            self._files.drop(shard_idx)  # a handle can be what is broken
            raise
        except (_Changed, UserError):  # UserError: it is no tar any more
            self._files.drop(shard_idx)
            self._indexes.forget(shard_idx)
        try:
            return read()
        except (_Changed, UserError):
            raise Unreadable("changed shard") from None

    def _members(self, shard_idx: int, sample_idx: int) -> tuple[Member, ...]:
        index = self.index(shard_idx)
        if sample_idx >= len(index):
            raise _Changed
        try:
            return index.members(sample_idx)
        except ValueError:
            raise BadMember("corrupt index") from None

    def _read(self, shard_idx: int, sample_idx: int, most_image_bytes: int | None) -> Sample:
        members = self._members(shard_idx, sample_idx)
        image = image_of(members)
        if most_image_bytes is not None and image.size > most_image_bytes:
            raise BadMember("too many bytes")
        key = f"{self._indexes.labels[shard_idx]}/{key_of(members[0].name)}"
        return Sample(key, self._bytes(shard_idx, image), self._caption(shard_idx, members))

    def _field(self, shard_idx: int, sample_idx: int, key: str) -> object:
        members = [m for m in self._members(shard_idx, sample_idx) if m.ext == "json"]
        return _json_field(self._json(shard_idx, members[0]), key) if members else None

    def _label(self, shard_idx: int, sample_idx: int) -> int:
        label = self._field(shard_idx, sample_idx, "label")
        if label is None:
            members = [m for m in self._members(shard_idx, sample_idx) if m.ext == "cls"]
            text = self._bytes(shard_idx, members[0], _MOST_CAPTION_BYTES) if members else b""
            digits = text.decode(errors="replace").strip()
            label = int(digits) if _INTEGER.fullmatch(digits) else -1
        return label if type(label) is int and abs(label) < 2**63 else -1

    def _caption(self, shard_idx: int, members: Sequence[Member]) -> str:
        if self.caption is None:
            return ""
        member = next(m for m in members if m.ext == self._caption_ext)
        key = self.caption.partition(":")[2]
        text = (
            _json_field(self._json(shard_idx, member), key)
            if key
            else self._bytes(shard_idx, member, _MOST_CAPTION_BYTES).decode(errors="replace")
        )
        if text is None:
            raise BadMember("missing caption")
        if not isinstance(text, str) or not text.strip():
            raise BadMember("empty caption")
        return text.strip()

    def _json(self, shard_idx: int, member: Member) -> bytes:
        if member.size > _MOST_JSON_BYTES:
            raise BadMember("overlong json")
        return self._bytes(shard_idx, member)

    def _bytes(self, shard_idx: int, member: Member, most: int | None = None) -> bytes:
        """The member's data, or its first `most` bytes. Its header is read too: it tells a shard that has changed."""
        wanted = member.size if most is None else min(member.size, most)
        data = self._files(shard_idx).read(BLOCK + wanted, member.offset - BLOCK)
        if len(data) != BLOCK + wanted or not is_header_of(data[:BLOCK], member):
            raise _Changed
        return data[BLOCK:]

    def _is_open(self, shard_idx: int) -> bool:
        """Whether the shard and its index can be opened: then only a part of it cannot be read."""
        try:
            self._files(shard_idx)
            self.index(shard_idx)
        except (OSError, UserError):
            return False
        return True

    def _count_all(self, shards: Sequence[int]) -> tuple[list[int], Counter[str]] | UserError:
        """(usable samples of each shard, bad samples by reason); an error is a result, to be told to all ranks."""
        try:
            with ThreadPoolExecutor(_INDEX_THREADS) as pool:
                counts = list(pool.map(self._count, shards))
        except UserError as error:
            return error
        return [count for count, _ in counts], sum((reasons for _, reasons in counts), Counter())

    def _count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """Whatever cannot be counted is an error: the order of all samples hangs on the sizes."""
        name = self.names[shard_idx]
        try:
            return self.patience(lambda: self._indexes.count(shard_idx), at_once=_STAYS)
        except FileNotFoundError:
            raise UserError(
                f"{name} does not exist: every named shard must; correct the pattern or upload it"
            ) from None
        except OSError as error:
            tried = "" if isinstance(error, _STAYS) else f", tried {self.patience.tries} times"
            raise UserError(
                f"{name} cannot be read ({error}){tried}: every named shard must be read "
                "once before a run; mend the storage, or leave the shard out"
            ) from None


def _json_field(data: bytes, key: str) -> object:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise BadMember("corrupt json") from None
    return record.get(key) if isinstance(record, dict) else None


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
