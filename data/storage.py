"""Where shards lie: patterns from the config -> a sorted list of shard names, and a local file for each.

A pattern is a file, a directory (all its .tar), a glob, a brace range or a URL that fsspec can open (s3://,
gs://, hf://, https://). Remote shards are copied once into the cache directory, whole: training reads them in
random order.

    expand(["data/{00000..00009}.tar", "s3://bucket/extra/*.tar"], cache_dir="/scratch/shards")
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from configs import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_WAITS_SECONDS = (1.0, 4.0, 0.0)  # after each failed try to copy a remote file
_SHOWN = 3  # missing files named in an error


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


def fetch(name: str, cache_dir: str | Path | None) -> Path:
    """A local file with the contents of `name`: itself when local, else the cached copy (made when missing).

    Raises FileNotFoundError when there is no such remote file and UserError when it cannot be read after 3
    tries.
    """
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
    """The size of a remote file, or None where the server does not tell."""
    filesystem, path = _filesystem(name)
    return filesystem.info(path).get("size")


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
            found |= set(glob.glob(name, recursive=True))
        else:
            found.add(name)
    _refuse_missing(pattern, sorted(name for name in found if not os.path.isfile(name)), len(found), key)
    return found


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
            found |= {filesystem.unstrip_protocol(match) for match in filesystem.glob(path)}
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


def _download(name: str, copy: Path) -> None:
    """Copies to a temporary name first, so that another process never sees half a shard."""
    filesystem, path = _filesystem(name)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        for wait_seconds in _WAITS_SECONDS:
            error = _copied(filesystem, path, partial)
            if error is None:
                partial.replace(copy)
                return
            time.sleep(wait_seconds)
    finally:
        partial.unlink(missing_ok=True)
    raise UserError(f"{name} cannot be copied to {copy.parent} ({error}), tried {len(_WAITS_SECONDS)} times")


def _copied(filesystem: Any, path: str, target: Path) -> OSError | None:
    """None on success, else what went wrong. Raises FileNotFoundError, which trying again does not mend."""
    try:
        with filesystem.open(path, "rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except FileNotFoundError:
        raise
    except OSError as error:
        return error
    return None
