"""Where shards lie: patterns from the config -> a sorted list of shard names, and an open file for each.

A pattern is a file, a directory (all its .tar), a glob, a brace range as in bash, or a URL (https://, s3://, gs://,
hf://: data/remote.py), or several of these separated by :: as in webdataset. A path that exists under the very name
that is given is taken literally. Remote shards are copied once into the cache directory, whole: training reads
them in random order.

    expand(["data/{00000..00009}.tar", "s3://bucket/extra/*.tar"], cache_dir="/scratch/shards")
    Disk("/scratch/shards").open("data/00003.tar").read(512, offset=1024)

Only listings are tried again here: a failure of storage is an OSError, which data/patience.py handles. `Disk` is the
only way from the reader to the storage: a test that replaces it can inject any failure.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from configs import UserError
from data import remote
from data.patience import Patience
from data.remote import RemoteCopies, is_remote

# "::" outside an IPv6 address, and not after a protocol that fsspec chains: simplecache::s3://bucket/0.tar
_SEPARATOR = re.compile(r"(?<!^simplecache)(?<!^blockcache)(?<!^filecache)::(?![^\[\]]*\])")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", re.ASCII)
_LISTING_TRIES = 4  # of a directory on a server: 7 s of waiting
_SHOWN = 3  # missing files named in an error
_MOST_NAMES = 1 << 22  # of one pattern: a typing error in a range gives billions


def expand(patterns: Sequence[str], cache_dir: str | Path | None = None, key: str = "data.train") -> list[str]:
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


def braces(pattern: str) -> Iterator[str]:
    """Expand braces as bash does: `a{08..11}b{x,y}` -> a08bx a08by a09bx ..., `{0..9..3}`, `{9..0}`, `{a..c}`.

    Braces may be nested. Ranges keep their zero padding. Braces around one word stay.
    """
    group = _first_braces(pattern)
    if group is None:
        yield pattern
        return
    start, end = group
    for choice in _choices(pattern[start + 1 : end]):
        for rest in braces(pattern[end + 1 :]):
            yield f"{pattern[:start]}{choice}{rest}"


class Disk:
    """Local files as they are, remote ones by their copy in `cache_dir`. Thread-safe. All trouble is an OSError."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self._copies = RemoteCopies(cache_dir) if cache_dir is not None else None

    def fetch(self, name: str) -> Path:
        """A local file with the contents of `name`: itself when local, else the cached copy (made when missing)."""
        return self._copies_of_remote.fetch(name) if is_remote(name) else Path(name)

    def is_copied(self, name: str) -> bool:
        """Whether a remote file has a copy, of any version."""
        return self._copies_of_remote.is_copied(name)

    def forget(self, name: str) -> None:
        """Delete the copy of a remote file: the next fetch downloads it again."""
        self._copies_of_remote.forget(name)

    def open(self, name: str) -> OpenFile:
        """The shard, copied first where it is remote and has no copy yet."""
        return OpenFile(self.fetch(name))

    @property
    def _copies_of_remote(self) -> RemoteCopies:
        assert self._copies is not None, "expand has refused remote names without a cache"
        return self._copies


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


def _first_braces(pattern: str) -> tuple[int, int] | None:
    """Return the positions of the first braces that enclose a range or a list; None without any."""
    opened: list[int] = []
    found: list[tuple[int, int]] = []
    for place, character in enumerate(pattern):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            group = opened.pop(), place
            if len(_split_commas(pattern[group[0] + 1 : place])) > 1 or _RANGE.fullmatch(pattern, group[0] + 1, place):
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
    match = _RANGE.fullmatch(inside)
    if match is None:
        for item in _split_commas(inside):
            yield from braces(item)
        return
    first, last, step, *letters = match.groups()
    if first is None:
        first, last, step = (str(ord(letters[0])), str(ord(letters[1])), letters[2])
    by = max(1, int(step or 1)) * (1 if int(first) <= int(last) else -1)
    width = max(len(first), len(last)) if any(re.match(r"-?0\d", end) for end in (first, last)) else 0
    for number in range(int(first), int(last) + (1 if by > 0 else -1), by):
        yield chr(number) if letters[0] else str(number).zfill(width)


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


def _existing_prefix_length(pattern: str) -> int:
    """Return the length of the longest prefix, up to a / or the end, that is an existing path: it is literal."""
    ends = [len(pattern), *(place for place in range(len(pattern) - 1, 0, -1) if pattern[place] == os.sep)]
    return next((end for end in ends if os.path.lexists(os.path.expanduser(pattern[:end]))), 0)


def _split_patterns(pattern: str) -> list[str]:
    """Split a pattern at ::, except within an existing path that contains it."""
    end = _existing_prefix_length(pattern)
    first, *others = _SEPARATOR.split(pattern[end:], maxsplit=1)
    return [pattern[:end] + first, *(part for rest in others for part in _split_patterns(rest))]


def _expand_one(pattern: str, cache_dir: str | Path | None, key: str) -> set[str]:
    """Return the shards that one pattern without :: names."""
    pattern = pattern.removeprefix("file://")
    end = 0 if is_remote(pattern) else _existing_prefix_length(pattern)
    names = [pattern[:end] + rest for rest in islice(braces(pattern[end:]), _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise UserError(
            f"{key}={pattern!r} names more than {_MOST_NAMES:,} shards, the most that a pattern may; correct the range"
        )
    if is_remote(pattern):
        return _remote(pattern, names, cache_dir, key)
    return _local(pattern, [os.path.expanduser(name) for name in names], key)


def _local(pattern: str, names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if os.path.isdir(name):
            found |= set(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif glob.has_magic(name) and glob.has_magic(name[_existing_prefix_length(name) :]):
            found |= _globbed(name)
        else:
            found.add(name)
    _refuse_missing(pattern, sorted(name for name in found if not os.path.isfile(name)), len(found), key)
    return found


def _globbed(name: str) -> set[str]:
    """Below ** a file is taken once, however many links lead to it: one to a folder above itself, forty times."""
    end = _existing_prefix_length(name)
    matches = glob.glob(glob.escape(name[:end]) + name[end:], recursive=True)
    matches.sort(key=lambda match: (match.count(os.sep), match))
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
        if remote.has_magic(name):
            found |= _listed(name)
        else:
            found.add(name)  # whether it exists shows when its index is read: one request less a shard
    _refuse_missing(pattern, [], len(found), key)
    return found


def _refuse_missing(pattern: str, missing: list[str], num_found: int, key: str) -> None:
    if missing:
        shown = ", ".join(name or "one without a name" for name in missing[:_SHOWN]) + (
            ", ..." if len(missing) > _SHOWN else ""
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


def _listed(name: str) -> set[str]:
    try:
        return set(Patience(_LISTING_TRIES)(lambda: remote.matches(name), (FileNotFoundError, PermissionError)))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(
            f"{name} cannot be listed ({error}): see whether the storage answers, then start again"
        ) from None
