"""Shard storage: config patterns -> shard names, random-access files, a cache of open ones, and retries.

    names = expand_patterns(["data/{00000..00009}.tar", "s3://bucket/extra/*.tar"], cache_dir="/scratch/shards")
    storage = ShardStorage("/scratch/shards")
    retries = StorageRetries(tries=6)
    retries(lambda: storage.open(names[3]).read(512, offset=1024))    # after 31 s of failures the last OSError

A pattern is a file, a directory (all its .tar), a glob, a brace range as in bash, or a URL (https://, s3://, gs://,
hf://: data/remote.py), or several of these separated by :: as in webdataset. A path that exists under the very name
that is given is taken literally. Remote shards are copied whole into the cache directory, once: training reads
them in random order.

`ShardStorage` is the only way from the reader to the storage: a test that replaces it can inject any failure. A failure
is an OSError. It is retried after 1, 2, 4 ... seconds; one that persists costs samples, not the run. The waits have no
random part: ranks that share a storage read different shards, and tests can rely on them. A read that never returns is
detected by the watchdog over the ranks, not here.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from configs import UserError
from data import remote
from data.http_files import RetryLater
from data.remote import RemoteCache, is_remote

T = TypeVar("T")
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
# "::" outside an IPv6 address, and not after a protocol that fsspec chains: simplecache::s3://bucket/0.tar
_SEPARATOR = re.compile(r"(?<!^simplecache)(?<!^blockcache)(?<!^filecache)::(?![^\[\]]*\])")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", re.ASCII)
_LISTING_TRIES = 4  # of listing a directory on a server: 7 s of waiting
_MAX_SHOWN = 3  # missing files named in an error
_MAX_NAMES = 1 << 22  # of one pattern: a typing error in a range gives billions
Value = TypeVar("Value")


def expand_patterns(patterns: Sequence[str], cache_dir: str | Path | None = None, key: str = "data.train") -> list[str]:
    """Return the shards that the patterns of config key `key` name, sorted, each once.

    A shard that links or other spellings name twice has the first of its names.

    Raises UserError for a pattern that finds nothing, a missing file, or a URL that cannot be read here.
    """
    if not patterns:
        raise UserError(f"{key} is empty: it names the shards to read; give at least one .tar file, glob or URL")
    by_file: dict[str, str] = {}
    folders: dict[str, str] = {}
    for pattern in patterns:
        parts = _split_patterns(pattern)
        if "" in parts:
            raise UserError(
                f"{key}={pattern!r}: element {parts.index('') + 1} of {len(parts)} is empty: each element between :: "
                "names shards; name a .tar file, glob or URL there, or remove the :: beside it"
            )
        for part in parts:
            for name in sorted(_expand_one(part, cache_dir, key)):
                by_file.setdefault(_real_path(name, folders), name)
    return sorted(by_file.values())


def require_any_shard(names: Sequence[str], key: str = "data.train") -> None:
    """Raise UserError where a resumed run finds none of its shards `names`.

    A few missing shards are skipped and counted. If all were missing, the run would wait for each of them.
    """
    if names and not any(is_remote(name) or os.path.exists(name) for name in names):
        raise UserError(
            f"--resume: none of the run's {len(names)} shards in {key} exists (the first is {names[0]}, the working "
            f"directory {os.getcwd()}): a run resumes with the shards it started with; start it from its original "
            "directory, or restore them"
        )


def _split_patterns(pattern: str) -> list[str]:
    """Split a pattern at ::, except within an existing path that contains it."""
    end = _existing_prefix_length(pattern)
    first, *others = _SEPARATOR.split(pattern[end:], maxsplit=1)
    return [pattern[:end] + first, *(part for rest in others for part in _split_patterns(rest))]


def _existing_prefix_length(pattern: str) -> int:
    """Return the length of the longest prefix, up to a / or the end, that is an existing path: it is literal."""
    ends = [len(pattern), *(idx for idx in range(len(pattern) - 1, 0, -1) if pattern[idx] == os.sep)]
    return next((end for end in ends if os.path.lexists(os.path.expanduser(pattern[:end]))), 0)


def _expand_one(pattern: str, cache_dir: str | Path | None, key: str) -> set[str]:
    """Return the shards that one pattern without :: names."""
    pattern = pattern.removeprefix("file://")
    end = 0 if is_remote(pattern) else _existing_prefix_length(pattern)
    names = [pattern[:end] + rest for rest in islice(expand_braces(pattern[end:]), _MAX_NAMES + 1)]
    if len(names) > _MAX_NAMES:
        raise UserError(
            f"{key}={pattern!r} names more than {_MAX_NAMES:,} shards, the most that a pattern may; correct the range"
        )
    if is_remote(pattern):
        return _expand_remote(pattern, names, cache_dir, key)
    return _expand_local(pattern, [os.path.expanduser(name) for name in names], key)


def _expand_local(pattern: str, names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if os.path.isdir(name):
            found |= set(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif glob.has_magic(name) and glob.has_magic(name[_existing_prefix_length(name) :]):
            found |= _glob(name)
        else:
            found.add(name)
    _refuse_missing(pattern, sorted(name for name in found if not os.path.isfile(name)), len(found), key)
    return found


def _glob(name: str) -> set[str]:
    """Glob local files. Below ** each file counts once: a link to a folder above itself leads there forty times."""
    end = _existing_prefix_length(name)
    matches = glob.glob(glob.escape(name[:end]) + name[end:], recursive=True)
    matches.sort(key=lambda match: (match.count(os.sep), match))
    if "**" not in name:
        return set(matches)
    by_file: dict[str, str] = {}
    for match in matches:
        by_file.setdefault(os.path.realpath(match), match)
    return set(by_file.values())


def _expand_remote(pattern: str, names: list[str], cache_dir: str | Path | None, key: str) -> set[str]:
    if cache_dir is None:
        raise UserError(
            f"{key}={pattern!r} is remote but system.loader.cache_dir is not set: remote shards are copied "
            "before they are read; set system.loader.cache_dir to a directory with room for them"
        )
    found: set[str] = set()
    for name in names:
        if remote.is_glob(name):
            found |= _glob_remote(name)
        else:
            found.add(name)  # its index is read later, which shows whether it exists: one request less a shard
    _refuse_missing(pattern, [], len(found), key)
    return found


def _glob_remote(name: str) -> set[str]:
    try:
        return set(StorageRetries(_LISTING_TRIES)(lambda: remote.glob_urls(name), (FileNotFoundError, PermissionError)))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(
            f"{name} cannot be listed ({error}): check whether the storage answers, then start again"
        ) from None


def _refuse_missing(pattern: str, missing: list[str], num_found: int, key: str) -> None:
    if missing:
        shown = ", ".join(name or "one without a name" for name in missing[:_MAX_SHOWN]) + (
            ", ..." if len(missing) > _MAX_SHOWN else ""
        )
        raise UserError(
            f"{key}={pattern!r}: {len(missing)} of {num_found} shards are missing ({shown}): every named "
            "shard must exist; correct the pattern or write the shards"
        )
    if not num_found:
        raise UserError(
            f"{key}={pattern!r} matches no file: it must name at least one .tar shard, relative to "
            f"{os.getcwd()}; correct the path, or write a corpus with python -m data.corpus"
        )


def _real_path(name: str, folders: dict[str, str]) -> str:
    """Return the path of a file without links, the same for all its names; a URL unchanged.

    `folders` caches the real paths of directories: on network storage each costs a round trip.
    """
    if is_remote(name):
        return name
    if os.path.islink(name):
        return os.path.realpath(name)
    folder, base = os.path.split(name)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], base)


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand braces as bash does: `a{08..11}b{x,y}` -> a08bx a08by a09bx ..., `{0..9..3}`, `{9..0}`, `{a..c}`.

    Braces may be nested. Ranges keep their zero padding. Braces around one word stay.
    """
    group = _first_braces(pattern)
    if group is None:
        yield pattern
        return
    start, end = group
    for choice in _choices(pattern[start + 1 : end]):
        for rest in expand_braces(pattern[end + 1 :]):
            yield f"{pattern[:start]}{choice}{rest}"


def _first_braces(pattern: str) -> tuple[int, int] | None:
    """Return the positions of the first braces that enclose a range or a list; None without any."""
    opened: list[int] = []
    found: list[tuple[int, int]] = []
    for idx, character in enumerate(pattern):
        if character == "{":
            opened.append(idx)
        elif character == "}" and opened:
            group = opened.pop(), idx
            if len(_split_commas(pattern[group[0] + 1 : idx])) > 1 or _RANGE.fullmatch(pattern, group[0] + 1, idx):
                found.append(group)
    return min(found, default=None)


def _split_commas(inside: str) -> list[str]:
    """Split at the commas outside of inner braces."""
    depth, items = 0, [""]
    for character in inside:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            items.append("")
        else:
            items[-1] += character
    return items


def _choices(inside: str) -> Iterator[str]:
    """Yield the choices of a range or a list, the text between two braces."""
    match = _RANGE.fullmatch(inside)
    if match is None:
        for item in _split_commas(inside):
            yield from expand_braces(item)
        return
    first, last, step, *letters = match.groups()
    if first is None:
        first, last, step = (str(ord(letters[0])), str(ord(letters[1])), letters[2])
    by = max(1, int(step or 1)) * (1 if int(first) <= int(last) else -1)
    width = max(len(first), len(last)) if any(re.match(r"-?0\d", end) for end in (first, last)) else 0
    for number in range(int(first), int(last) + (1 if by > 0 else -1), by):
        yield chr(number) if letters[0] else str(number).zfill(width)


class ShardStorage:
    """Opens local files, and remote ones by their copy in `cache_dir`. Thread-safe. Failures are OSErrors."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self._cache = RemoteCache(cache_dir) if cache_dir is not None else None

    def fetch(self, name: str) -> Path:
        """Return the path of a local file, or of the cached copy of a remote one, downloaded if needed."""
        return self._remote_cache.fetch(name) if is_remote(name) else Path(name)

    def is_copied(self, name: str) -> bool:
        """Whether a remote file has a copy, of any version."""
        return self._remote_cache.is_copied(name)

    def forget(self, name: str) -> None:
        """Delete the copy of a remote file: the next fetch downloads it again."""
        self._remote_cache.forget(name)

    def open(self, name: str) -> OpenFile:
        """Open a shard, downloaded first where it is remote and has no copy yet."""
        return OpenFile(self.fetch(name))

    @property
    def _remote_cache(self) -> RemoteCache:
        assert self._cache is not None, "expand has refused remote names without a cache"
        return self._cache


class OpenFile:
    """A file open for random access; closed with its last reference, so that no read is cut short."""

    def __init__(self, path: Path) -> None:
        # Non-blocking: opening a pipe in a shard's place would block until somebody wrote to it.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(f"{path} is no regular file")

    def read(self, num_bytes: int, offset: int) -> bytes:
        """Read `num_bytes` from `offset` on: fewer at the end of the file."""
        available = os.fstat(self._descriptor).st_size - offset  # a foreign index may request any number
        return os.pread(self._descriptor, min(num_bytes, available), offset) if available > 0 <= offset else b""

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class LruCache(Generic[Value]):
    """Cache of make(idx) for the `size` indices used last. Thread-safe; two threads that miss at once both make.

    open_files = LruCache(lambda shard_idx: open(names[shard_idx], "rb"), size=128)
    open_files(3) is open_files(3)         # True
    open_files.drop(3)                     # the next open_files(3) opens again
    """

    def __init__(self, make: Callable[[int], Value], size: int) -> None:
        self._make, self._size = make, size
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, idx: int) -> Value:
        with self._lock:
            if idx in self._values:
                self._values.move_to_end(idx)
                return self._values[idx]
        made = self._make(idx)
        with self._lock:
            made = self._values.setdefault(idx, made)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return made

    def drop(self, idx: int) -> None:
        """Forget a value, if it is cached."""
        with self._lock:
            self._values.pop(idx, None)


class Unreadable(Exception):
    """A sample cannot be read from storage now; the text is the reason under which it is counted.

    `is_waited_for`: all retries failed, and would cost as much time at the next sample.
    `is_whole_shard`: nothing of the shard can be read.
    """

    def __init__(self, reason: str, is_waited_for: bool = False, is_whole_shard: bool = False) -> None:
        super().__init__(reason)
        self.is_waited_for, self.is_whole_shard = is_waited_for, is_whole_shard


class StorageRetries:
    """Calls an action again where it raises OSError, up to `tries` times in all. Thread-safe."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self._is_stopped = threading.Event()

    def __call__(self, action: Callable[[], T], permanent: tuple[type[OSError], ...] = ()) -> T:
        """Return action(), or raise its last error; `permanent` errors are not retried."""
        tried = 0
        while True:
            try:
                return action()
            except OSError as error:  # noqa: PERF203 - retrying is the purpose of the loop
                tried += 1
                requested = error.seconds if isinstance(error, RetryLater) else 0.0
                seconds = max(wait_seconds(tried), min(requested, _LONGEST_WAIT_SECONDS))
                if isinstance(error, permanent) or tried == self.tries or self._is_stopped.wait(seconds):
                    raise

    def stop(self) -> None:
        """End all waiting, now and later: the run is stopping."""
        self._is_stopped.set()


def wait_seconds(tried: int) -> float:
    """Return the wait after `tried` failures in a row: 1 -> 1.0, 2 -> 2.0, 3 -> 4.0, at most a minute."""
    return min(_FIRST_WAIT_SECONDS * 2.0 ** (tried - 1), _LONGEST_WAIT_SECONDS)
