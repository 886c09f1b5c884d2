"""Where shards lie: patterns from the config -> a sorted list of shard names, and an open file for each.

A pattern is a file, a directory (all its .tar), a glob, a brace range or a URL that fsspec can open (s3://,
gs://, hf://, https://). Remote shards are copied once into the cache directory, whole: training reads them in
random order.

    expand(["data/{00000..00009}.tar", "s3://bucket/extra/*.tar"], cache_dir="/scratch/shards")
    Disk("/scratch/shards").open("data/00003.tar").read(512, offset=1024)

Nothing here tries twice: what storage refuses is an OSError, and data/patience.py says what becomes of it. `Disk` is
all that stands between the reader and the storage: a test that puts another in its place injects any trouble there is.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from configs import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_SHOWN = 3  # missing files named in an error
T = TypeVar("T")


def expand(patterns: Sequence[str], cache_dir: str | Path | None = None, key: str = "data.train") -> list[str]:
    """The shards that the patterns of config key `key` name, sorted, each once.

    Raises UserError for a pattern that finds nothing, a missing file, or a URL that cannot be read here.
    """
    if not patterns:
        raise UserError(f"{key} is empty: it names the shards to read; give at least one .tar file, glob or URL")
    found: set[str] = set()
    for pattern in patterns:
        named = list(braces(pattern))
        if is_remote(pattern):
            found |= _remote(pattern, named, cache_dir, key)
        else:
            found |= _local(pattern, [os.path.expanduser(name) for name in named], key)
    return sorted(found)


def braces(pattern: str) -> list[str]:
    """`a{08..11}b{x,y}` -> a08bx a08by a09bx ...: ranges keep their zero padding."""
    pieces = _BRACES.split(pattern)
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def is_remote(name: str) -> bool:
    """Whether it is a URL."""
    return "://" in name


class Disk:
    """Local files as they are, remote ones by their copy in `cache_dir`. Thread-safe. All trouble is an OSError."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self._cache_dir = cache_dir

    def fetch(self, name: str) -> Path:
        """A local file with the contents of `name`: itself when local, else the cached copy (made when missing)."""
        return fetch(name, self._cache_dir)

    def open(self, name: str) -> OpenFile:
        """The shard, copied first where it is remote and has no copy yet."""
        return OpenFile(self.fetch(name))


class OpenFile:
    """A file open for reading anywhere in it; closed when its last reader lets go, so none is cut short."""

    def __init__(self, path: Path) -> None:
        # Without waiting: a pipe in a shard's place would hold the reader until somebody wrote to it.
        self._number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self._number).st_mode):
            raise OSError(f"{path} is no regular file")

    def read(self, num_bytes: int, offset: int) -> bytes:
        """The bytes there are of the `num_bytes` from `offset` on: fewer at the end of the file."""
        there = os.fstat(self._number).st_size - offset  # an index from elsewhere may ask for any number
        return os.pread(self._number, min(num_bytes, there), offset) if there > 0 <= offset else b""

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def fetch(name: str, cache_dir: str | Path | None) -> Path:
    """A local file with the contents of `name`. Raises OSError; FileNotFoundError: there is no such remote file."""
    if not is_remote(name):
        return Path(name)
    assert cache_dir is not None, "expand has refused remote names without a cache"
    folder = Path(cache_dir) / hashlib.sha256(os.path.dirname(name).encode()).hexdigest()[:12]
    copy = folder / os.path.basename(name)
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(name, copy)
    return copy


def remote_bytes(name: str) -> int | None:
    """The size of a remote file, or None where the server does not tell. Raises OSError."""
    filesystem, path = _filesystem(name)
    size: int | None = _asked(name, lambda: filesystem.info(path)).get("size")
    return size


def _choices(inside: str) -> list[str]:
    if match := _RANGE.match(inside):
        first, last = match.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _local(pattern: str, names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if os.path.isdir(name):
            found |= set(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif glob.has_magic(name):
            found |= _globbed(name)
        else:
            found.add(name)
    _refuse_missing(pattern, sorted(name for name in found if not os.path.isfile(name)), len(found), key)
    return found


def _globbed(name: str) -> set[str]:
    """Below ** a file is taken once, however many links lead to it: one to a folder above itself, forty times."""
    matches = sorted(glob.glob(name, recursive=True), key=lambda match: (match.count(os.sep), match))
    if "**" not in name:
        return set(matches)
    by_file: dict[str, str] = {}
    for match in matches:
        by_file.setdefault(os.path.realpath(match), match)
    return set(by_file.values())


def _remote(pattern: str, names: list[str], cache_dir: str | Path | None, key: str) -> set[str]:
    if cache_dir is None:
        raise UserError(
            f"{key}={pattern!r} is remote but system.loader.cache_dir is not set: remote shards are copied "
            "before they are read; set system.loader.cache_dir to a directory with room for them"
        )
    found: set[str] = set()
    for name in names:
        if glob.has_magic(name):
            filesystem, path = _filesystem(name)
            found |= {filesystem.unstrip_protocol(match) for match in _listed(name, filesystem, path)}
        else:
            found.add(name)  # whether it exists shows when its index is read: one request less a shard
    _refuse_missing(pattern, [], len(found), key)
    return found


def _refuse_missing(pattern: str, missing: list[str], num_found: int, key: str) -> None:
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise UserError(
            f"{key}={pattern!r}: {len(missing)} of {num_found} shards are missing ({shown}): every named "
            "shard must exist; correct the pattern or write the shards"
        )
    if not num_found:
        raise UserError(
            f"{key}={pattern!r} matches no file: it must name at least one .tar shard, relative to "
            f"{os.getcwd()}; correct the path, or write a corpus with python -m data.corpus"
        )


def _filesystem(name: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {error}; install the fsspec back end for this protocol") from None


def _listed(name: str, filesystem: Any, path: str) -> list[str]:
    try:
        return list(_asked(name, lambda: filesystem.glob(path)))
    except OSError as error:
        raise UserError(
            f"{name} cannot be listed ({error}): see whether the storage answers, then start again"
        ) from None


def _asked(name: str, request: Callable[[], T]) -> T:
    """What a remote storage answers. Back ends raise errors of their own libraries: all become OSError."""
    try:
        return request()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{name}: {type(error).__name__}: {error}") from error


def _download(name: str, copy: Path) -> None:
    """Copies to a temporary name first, so that another process never sees half a shard."""
    filesystem, path = _filesystem(name)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        _asked(name, lambda: _copy(filesystem, path, partial))
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)


def _copy(filesystem: Any, path: str, target: Path) -> None:
    """Raises OSError for a copy that ends early: a connection that is cut off can look like the end of the file."""
    with filesystem.open(path, "rb") as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        expected, copied = getattr(source, "size", None), file.tell()
    if isinstance(expected, int) and copied != expected:
        raise OSError(f"{path} gave {copied} of {expected} bytes")
