"""Tar shards as a random-access corpus: which samples there are, and the bytes of any of them.

    shards = Shards(expand_patterns(["corpus/*.tar"]), caption="txt")
    shards.sizes                                  # usable samples of each shard
    shards.read(3, 17).caption                    # "a red circle"

Reads what img2dataset and webdataset write (`000000123.jpg` + `.txt` and/or `.json` in `00000.tar`). Each tar is
indexed once into `00000.idx` beside it (data/tar_index.py), or in the cache directory where that is not writable:

    python -m data.shards index DIR...            # beforehand, or the first run does it
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs import UserError
from configs.command_line import CommandParser
from configs.data import check_caption
from data.annotations import ClassIndex, TextDecodeError, decode_text, draw_caption, parse_label, visible_captions
from data.processes import map_in_order
from data.remote import NotAShard
from data.storage import LruCache, ShardStorage, StorageRetries, Unreadable, expand_patterns
from data.tar_headers import BLOCK
from data.tar_index import ShardIndex, ShardIndexes
from data.tar_samples import TarMember, find_extension, image_of, key_of, matches_header

GatherObjects = Callable[[Any], list[Any]]  # returns every rank's argument, in order, on every rank; a collective
T = TypeVar("T")
_OPEN_FILES = 128  # tar files kept open; the usual limit of a process is 1,024
_INDEX_THREADS = 16  # opening many sidecars waits for the disk or the network
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotAShard)  # trying again would give the same
_TRIES = 6  # unless system.loader.tries is given: 31 s of waiting
# A caption may be megabytes long. No row of tokens holds more than a part of this: the rest is not read.
_MAX_CAPTION_BYTES = 1 << 18
_MAX_SHOWN_SHARDS = 3  # shards named in a summary
_NOT_WRITABLE = "no directory for them is writable; set system.loader.cache_dir to one that is"
_MAX_FIELDS, _MAX_SHOWN_FIELDS = 64, 12  # of .json members without the caption's field: kept, and shown in an error
_MAX_JSON_BYTES = 1 << 22  # a part of a record cannot be parsed: longer ones are refused


class BadMember(ValueError):
    """A member of a sample is unusable; the text is the reason under which it is counted."""


@dataclass(frozen=True)
class EncodedSample:
    """One sample as its shard holds it, not decoded."""

    key: str  # "shard/sample", unique in the corpus
    image: bytes  # file bytes
    caption: str  # empty where the corpus is read without captions


class _ShardChanged(Exception):
    """A shard does not match its index."""


class Shards:
    """A corpus of shards. `caption` is a member extension, `json:KEY`, or None to read images alone. Thread-safe.

    Of several captions, a list in the .json member, one is drawn by hash of (`seed`, sample key, epoch).

    `open_indexes` indexes stay in memory. With `gather_objects` rank r of W opens (and where needed indexes) the shards
    r, r + W ... only and gets the other counts from the other ranks. Raises UserError for a shard that is missing or no
    tar, on all ranks. With the `sizes` of an earlier opening no shard is opened before it is read, and `bad` stays
    empty.

    Storage errors are retried, up to `tries` tries (data/storage.py). Once the corpus is open, a shard that vanishes or
    fails costs its samples, which are Unreadable. One that changes is indexed again: the order stays that of the
    sizes at the start, and a sample that is no longer in it is Unreadable too.
    """

    def __init__(
        self,
        names: Sequence[str],
        caption: str | None,
        cache_dir: str | Path | None = None,
        open_indexes: int = 64,
        rank: int = 0,
        world_size: int = 1,
        gather_objects: GatherObjects | None = None,
        tries: int = _TRIES,
        sizes: NDArray[np.int64] | None = None,
        seed: int = 0,
    ) -> None:
        self.names, self.caption, self.seed = tuple(names), caption, seed
        self.retries = StorageRetries(tries)
        storage = ShardStorage(cache_dir)
        self._caption_ext = caption and caption.partition(":")[0]
        self._indexes = ShardIndexes(self.names, self._caption_ext, storage, cache_dir, open_indexes)
        self._files = LruCache(lambda shard_idx: storage.open(self.names[shard_idx]), _OPEN_FILES)
        self._fields_seen: Counter[str] = Counter()  # fields of .json members that lack the caption's
        self.bad: Counter[str] = Counter()
        if sizes is not None:
            self.sizes = sizes
            return
        step = world_size if gather_objects else 1
        own = self._count_all(range(rank if gather_objects else 0, len(self.names), step))
        parts: list[Any] = gather_objects(own) if gather_objects else [own]
        for part in parts:
            if isinstance(part, UserError):
                raise part
        self.sizes = np.empty(len(self.names), np.int64)
        for start, (sizes, _) in enumerate(parts):
            self.sizes[start::step] = sizes
        self.bad = sum((reasons for _, reasons in parts), Counter())

    def summary(self, left_out: Counter[str]) -> str:
        """Return a line on shards, samples, those left out by reason, and shards without a sample."""
        empty = [name for name, size in zip(self.names, self.sizes.tolist(), strict=True) if not size]
        shown = ", ".join(empty[:_MAX_SHOWN_SHARDS]) + (", ..." if len(empty) > _MAX_SHOWN_SHARDS else "")
        in_memory = self._indexes.num_in_memory
        return (
            f"{_count_of(len(self.names), 'shard')}, {_count_of(int(self.sizes.sum()), 'sample')}{_reasons(left_out)}"
            + (f"; no sample in {_count_of(len(empty), 'shard')}: {shown}" if empty else "")
            + (f"; {_count_of(in_memory, 'index')} in memory only: {_NOT_WRITABLE}" if in_memory else "")
        )

    def index_folder(self, shard_idx: int) -> Path | None:
        """Return the directory of a shard's index; None for one in memory. Raises OSError."""
        return self._indexes.folder(shard_idx)

    def index(self, shard_idx: int) -> ShardIndex:
        """Return the index of a shard as it was when it was last opened. Raises OSError, without retries."""
        return self._indexes.load(shard_idx)

    def read(
        self, shard_idx: int, sample_idx: int, max_image_bytes: int | None = None, epoch: int = 0
    ) -> EncodedSample:
        """Read the bytes of one sample, and its caption in an epoch.

        Raises BadMember, and Unreadable where storage does not give them.
        """
        return self._retry(shard_idx, lambda: self._read(shard_idx, sample_idx, max_image_bytes, epoch))

    def label(self, shard_idx: int, sample_idx: int, classes: ClassIndex | None = None) -> int:
        """Read the class number: from field `label` of the .json member or from the .cls member; -1 without either.

        A class name there is looked up in `classes`. Raises BadMember for a malformed .json member, and Unreadable.
        """
        return self._retry(shard_idx, lambda: self._label(shard_idx, sample_idx, classes))

    def key(self, shard_idx: int, sample_idx: int) -> str:
        """Return the key of a sample; with its number where the index cannot be read now."""
        try:
            return self.index(shard_idx).key(sample_idx)
        except (OSError, ValueError, IndexError):
            return f"{self._indexes.labels[shard_idx]}/#{sample_idx}"

    def caption_hint(self, bad: Counter[str]) -> str:
        """Return what an error about `bad` samples adds where most lack a caption: the fields or members they have."""
        if bad["missing caption"] * 2 <= bad.total():
            return ""
        if self._fields_seen:
            return (
                f"; data.caption={self.caption} names a field that .json members lack: they have "
                f"{_most_frequent(self._fields_seen)}; set data.caption to json:FIELD"
            )
        try:
            exts = self._indexes.caption_exts(0) if self.names else []
        except (OSError, UserError):  # the error names this failure already
            return ""
        if self._caption_ext in (None, *exts):
            return ""
        return (
            f"; data.caption={self.caption} names a member that samples of {self.names[0]} lack: beside the image "
            f"they have {', '.join(exts) or 'none'}; set data.caption to the extension that holds the text, or to "
            "json:FIELD"
        )

    def _retry(self, shard_idx: int, read: Callable[[], T]) -> T:
        """Return read(), retried where storage fails, and once more with a new index where the shard has changed."""
        try:
            return self.retries(lambda: self._reindex_if_changed(shard_idx, read))
        except FileNotFoundError:
            raise Unreadable("vanished shard", is_waited_for=True, is_whole_shard=True) from None
        except OSError as error:
            raise Unreadable(
                "storage error", is_waited_for=True, is_whole_shard=not self._is_open(shard_idx)
            ) from error

    def _reindex_if_changed(self, shard_idx: int, read: Callable[[], T]) -> T:
        try:
            return read()
        except OSError:
            self._files.drop(shard_idx)  # the open file may be what is broken
            raise
        except (_ShardChanged, UserError):  # UserError: it is no tar any more
            self._files.drop(shard_idx)
        try:
            self._indexes.renew(shard_idx)
            return read()
        except (_ShardChanged, UserError):
            raise Unreadable("changed shard") from None

    def _members(self, shard_idx: int, sample_idx: int) -> tuple[TarMember, ...]:
        index = self.index(shard_idx)
        if sample_idx >= len(index):
            raise _ShardChanged
        try:
            return index.members(sample_idx)
        except ValueError:
            raise BadMember("corrupt index") from None

    def _read(self, shard_idx: int, sample_idx: int, max_image_bytes: int | None, epoch: int) -> EncodedSample:
        members = self._members(shard_idx, sample_idx)
        image = image_of(members)
        if max_image_bytes is not None and image.size > max_image_bytes:
            raise BadMember("too many bytes")
        key = f"{self._indexes.labels[shard_idx]}/{key_of(members)}"
        captions = self._captions(shard_idx, members) if self.caption is not None else ("",)
        return EncodedSample(key, self._bytes(shard_idx, image), draw_caption(captions, self.seed, key, epoch))

    def _field(self, shard_idx: int, sample_idx: int, key: str) -> object:
        member = _find_member(self._members(shard_idx, sample_idx), "json")
        return _parse_record(self._json(shard_idx, member)).get(key) if member else None

    def _label(self, shard_idx: int, sample_idx: int, classes: ClassIndex | None) -> int:
        json_label = parse_label(self._field(shard_idx, sample_idx, "label"))
        labels = [json_label]
        if not isinstance(json_label, int):
            labels.append(parse_label(self._cls_text(shard_idx, sample_idx)))
        for label in labels:
            if isinstance(label, int):
                return label
        name = next((label for label in labels if isinstance(label, str)), None)
        return classes.lookup(name, self.key(shard_idx, sample_idx)) if classes and name else -1

    def _cls_text(self, shard_idx: int, sample_idx: int) -> str | None:
        member = _find_member(self._members(shard_idx, sample_idx), "cls")
        try:
            return decode_text(self._bytes(shard_idx, member, _MAX_CAPTION_BYTES)) if member else None
        except TextDecodeError:
            return None

    def _captions(self, shard_idx: int, members: Sequence[TarMember]) -> tuple[str, ...]:
        """Return the sample's captions, at least one. Raises BadMember."""
        assert self.caption is not None
        member = _find_member(members, self._caption_ext or "")
        assert member is not None, "the index leaves out samples without a caption"
        key = self.caption.partition(":")[2]
        value = self._caption_field(shard_idx, member, key) if key else self._text(shard_idx, member)
        if captions := visible_captions(value):
            return captions
        raise BadMember("empty caption")

    def _caption_field(self, shard_idx: int, member: TarMember, key: str) -> object:
        record = _parse_record(self._json(shard_idx, member))
        if record.get(key) is None:
            if key not in record and len(self._fields_seen) < _MAX_FIELDS:
                self._fields_seen.update(map(str, record))
            raise BadMember("missing caption")
        return record[key]

    def _text(self, shard_idx: int, member: TarMember) -> str:
        try:
            return decode_text(
                self._bytes(shard_idx, member, _MAX_CAPTION_BYTES), is_cut_off=member.size > _MAX_CAPTION_BYTES
            )
        except TextDecodeError:
            raise BadMember("not UTF-8") from None

    def _json(self, shard_idx: int, member: TarMember) -> bytes:
        if member.size > _MAX_JSON_BYTES:
            raise BadMember("overlong json")
        return self._bytes(shard_idx, member)

    def _bytes(self, shard_idx: int, member: TarMember, max_bytes: int | None = None) -> bytes:
        """Read a member's data, or its first `max_bytes`, and its header, by which a changed shard is detected."""
        wanted = member.size if max_bytes is None else min(member.size, max_bytes)
        data = self._files(shard_idx).read(BLOCK + wanted, member.offset - BLOCK)
        if len(data) != BLOCK + wanted or not matches_header(data[:BLOCK], member):
            raise _ShardChanged
        return data[BLOCK:]

    def _is_open(self, shard_idx: int) -> bool:
        """Whether the shard and its index can be opened: then only a part of it is unreadable."""
        try:
            self._files(shard_idx)
            self.index(shard_idx)
        except (OSError, UserError):
            return False
        return True

    def _count_all(self, shards: Sequence[int]) -> tuple[list[int], Counter[str]] | UserError:
        """Return (usable samples of each shard, bad samples by reason), or an error, for all ranks to raise."""
        try:
            with ThreadPoolExecutor(_INDEX_THREADS) as pool:
                counts = list(pool.map(self._count, shards))
        except UserError as error:
            return error
        return [count for count, _ in counts], sum((reasons for _, reasons in counts), Counter())

    def _count(self, shard_idx: int) -> tuple[int, Counter[str]]:
        """Count a shard. Raises UserError where it cannot be read: the order of all samples depends on the sizes."""
        name = self.names[shard_idx]
        try:
            return self.retries(lambda: self._indexes.count(shard_idx), permanent=_PERMANENT_ERRORS)
        except FileNotFoundError:
            raise UserError(
                f"{name} does not exist: every named shard must; correct the pattern or upload it"
            ) from None
        except OSError as error:
            tried = "" if isinstance(error, _PERMANENT_ERRORS) else f", tried {self.retries.tries} times"
            raise UserError(
                f"{name} cannot be read ({error}){tried}: every named shard must be read "
                "once before a run; mend the storage, or leave the shard out"
            ) from None


def _find_member(members: Sequence[TarMember], ext: str) -> TarMember | None:
    idx = find_extension([m.ext for m in members], ext)
    return None if idx is None else members[idx]


def _parse_record(data: bytes) -> dict[str, Any]:
    """Parse a .json member; {} where it is not an object. Raises BadMember."""
    try:
        record = json.loads(data)
    except UnicodeDecodeError:
        raise BadMember("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadMember("corrupt json") from None
    return record if isinstance(record, dict) else {}


def _most_frequent(names: Counter[str]) -> str:
    """List the most frequent names, for an error message."""
    shown = [repr(name)[:40] for name, _ in names.most_common(_MAX_SHOWN_FIELDS)]
    return ", ".join(shown) + (", ..." if len(names) > _MAX_SHOWN_FIELDS else "")


@dataclass(frozen=True)
class _IndexedShard:
    """The result of indexing one shard."""

    size: int
    bad: Counter[str]
    folder: Path | None  # of its index; None: in memory


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m data.shards index DIR...`: writes sidecars, prints counts. Exit code 0, or 2 on an error."""
    parser = CommandParser(prog="python -m data.shards", description="Index tar shards for random access.")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="write X.idx for every X.tar and print what it holds")
    index.add_argument("dirs", nargs="+", metavar="DIR", help="directories, .tar files, globs, brace ranges or URLs")
    index.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="shards indexed at once (%(default)s)"
    )
    index.add_argument("--caption", default="txt", help="caption member: an extension or json:KEY (default: txt)")
    index.add_argument(
        "--cache-dir", help="system.loader.cache_dir of the runs: indexes of read-only shards, copies of remote ones"
    )
    arguments = parser.parse_args(argv)
    try:
        check_caption(arguments.caption, "--caption ")
        names = expand_patterns(arguments.dirs, arguments.cache_dir, key="DIR")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    processes = max(1, min(arguments.processes, len(names)))
    print(f"indexing {_count_of(len(names), 'shard')}, {processes} at once", flush=True)
    index_one = partial(_index, caption=arguments.caption, cache_dir=arguments.cache_dir)
    return _print_indexed(names, map_in_order(index_one, names, processes, chunk=1))


def _index(name: str, caption: str, cache_dir: str | None) -> _IndexedShard | UserError:
    try:
        shards = Shards([name], caption, cache_dir)
    except UserError as error:
        return error
    return _IndexedShard(int(shards.sizes[0]), shards.bad, shards.index_folder(0))


def _print_indexed(names: Sequence[str], results: Iterable[_IndexedShard | UserError]) -> int:
    """Print a line for each shard as it is done, then the totals; return the exit code."""
    done: list[_IndexedShard] = []
    elsewhere: Counter[Path | None] = Counter()
    for name, result in zip(names, results, strict=True):
        if isinstance(result, UserError):
            print(f"error: {result}", file=sys.stderr, flush=True)
            continue
        done.append(result)
        print(f"{name}: {_count_of(result.size, 'sample')}{_reasons(result.bad)}", flush=True)
        if result.folder != Path(name).parent:
            elsewhere[result.folder] += 1
    bad = sum((result.bad for result in done), Counter[str]())
    size = sum(result.size for result in done)
    print(f"{_count_of(len(done), 'shard')}, {_count_of(size, 'sample')}{_reasons(bad)}")
    for folder, count in elsewhere.items():
        kept = f"in {folder}" if folder else "not kept: no directory for them is writable; give one with --cache-dir"
        print(f"{_count_of(count, 'index')} {kept}")
    return 0 if len(done) == len(names) else 2


def _count_of(number: int, noun: str) -> str:
    plural = {"index": "indexes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def _reasons(bad: Counter[str]) -> str:
    listed = ", ".join(f"{count:,} {reason}" for reason, count in bad.most_common())
    return f"; {bad.total():,} left out: {listed}" if bad else ""


if __name__ == "__main__":
    sys.exit(main())
