"""The sidecar index of a tar shard: where each sample's bytes lie, and what was set aside and why.

The format is DALI's `wds2idx` v1.2, so one file serves this loader and DALI's own webdataset reader. With one
sample of a 12 kB picture and a 30-byte caption:

    v1.2 1
    jpg 512 12000 000000000.jpg txt 13312 30 000000000.txt
    # {"crc32": [..., ...], "of": {"tar_bytes": 20480, ..., "set_aside": [["000000001", "empty image"]], "usable": ...}}

DALI reads as many lines as the first one says; the last line is ours. It shows that an index is stale (tar_bytes,
tar_mtime_ns, and the version of the rules by which members are grouped into samples) and gives the counts of a shard
from the file's end, so that opening thousands of shards does not parse them. Its checksums, of the lines above and of
itself, make a damaged index visible: it is built again. Every member has an offset of its own: those of a sample need
not be adjacent.

White space and % in names are written as %20 and so on, because DALI separates fields by spaces. After the name of a
hard link follow %00 and the name of the member that holds its bytes.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from data.image_types import IMAGE_EXTS
from data.tars.listing import Listing, Member, key_of
from data.tars.names import find_ext

_VERSION = "v1.2"
_RULES_VERSION = f"2 {' '.join(IMAGE_EXTS)}"  # of listing.py and names.py: an index of another version is built again
_TAIL_BYTES = 1 << 14
_MTIME_TOLERANCE_NS = 2 * 10**9  # file systems round times, by up to 2 s


class Damaged(ValueError):
    """An index that does not say what it said when it was written."""


@dataclass(frozen=True)
class Usable:
    """A shard for one way of captioning: kept samples as sidecar lines, bad ones as (key, reason)."""

    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


def parse(line: str) -> tuple[Member, ...]:
    """The members of a sample from its sidecar line. Raises Damaged where it is none."""
    try:
        fields = zip(*[iter(line.split(" "))] * 4, strict=True)
        return tuple(
            Member(_unquote(ext), int(offset), int(size), *_unquote(name).split("\0", 1))
            for ext, offset, size, name in fields
        )
    except ValueError:
        raise Damaged(f"not a line of an index: {line[:80]!r}") from None


def serialise(listing: Listing, tar: os.stat_result) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of a sidecar, and its last line as `read_trailer` gives it.

    `tar` is the shard's status before the scan, so that the index of one that grows meanwhile is stale at once.
    """
    lines = [" ".join(f"{_quote(m.ext)} {m.offset} {m.size} {_quoted_name(m)}" for m in s) for s in listing.samples]
    counts = {ext: _usable(lines, listing.set_aside, ext or None) for ext in ["", *_caption_exts(listing)]}
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


def write(content: bytes, target: Path) -> None:
    """Write a sidecar under a temporary name and rename it: several ranks may index one shard at once."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        with partial.open("xb") as file:
            file.write(content)
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read(content: bytes, caption_ext: str | None) -> Usable:
    """Parse a sidecar whose last line is good; `caption_ext` None: no caption is needed. Raises Damaged."""
    text, mark, last = content.rpartition(b"\n# ")
    last_line = _last_line(last)
    if not mark or last_line is None or zlib.crc32(text + b"\n") != last_line["crc32"][0]:
        raise Damaged("the index does not match its checksum")
    lines = text.decode(errors="surrogateescape").split("\n")[1:]
    try:
        return _usable(lines, last_line["of"]["set_aside"], caption_ext)
    except (ValueError, IndexError):
        raise Damaged("the index has malformed lines") from None


def read_trailer(sidecar: Path, tar: Path | None, tar_bytes: int | None = None) -> dict[str, Any] | None:
    """Read our last line of a sidecar; None where it is missing, foreign, damaged, or does not match the tar.

    It does not match a tar of another size or time, or one that is later than the sidecar.
    """
    try:
        with sidecar.open("rb") as file:
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
        return trailer if matches_tar(trailer, status) and status.st_mtime_ns <= sidecar.stat().st_mtime_ns else None
    return trailer if tar_bytes in (None, trailer["tar_bytes"]) else None


def matches_tar(trailer: dict[str, Any], tar: os.stat_result) -> bool:
    """Whether an index was built from a tar of this size and time."""
    apart_ns = abs(tar.st_mtime_ns - trailer["tar_mtime_ns"])
    return bool(tar.st_size == trailer["tar_bytes"] and apart_ns <= _MTIME_TOLERANCE_NS)


def _last_line(line: bytes) -> dict[str, Any] | None:
    """What stands behind the mark on the last line; None for anything but a whole one."""
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
    """A checksum tells damage, not who wrote it: an index from elsewhere may say anything."""
    set_aside, usable = trailer["set_aside"], trailer["usable"]
    return (
        trailer["rules"] == _RULES_VERSION
        and is_count(trailer["tar_bytes"])
        and type(trailer["tar_mtime_ns"]) is int
        and all(isinstance(text, str) for key, reason in set_aside for text in (key, reason))
        and all(is_count(kept) and all(map(is_count, bad.values())) for kept, bad in usable.values())
    )


def is_count(value: object) -> bool:
    """0, 1, 2 ... that fits 64 bits; True is none."""
    return type(value) is int and 0 <= value < 2**63


def _usable(lines: Sequence[str], set_aside: Iterable[tuple[str, str]], caption_ext: str | None) -> Usable:
    bad = [(key, reason) for key, reason in set_aside]
    if caption_ext is None:
        return Usable(tuple(lines), tuple(bad))
    kept = []
    wanted = _quote(caption_ext)
    for line in lines:
        fields = line.split(" ")
        exts, sizes = fields[::4], fields[2::4]
        if len(fields) % 4:
            raise Damaged(f"not a line of an index: {line[:80]!r}")
        place = find_ext(exts, wanted)
        if place is not None and sizes[place] != "0":
            kept.append(line)
        else:
            bad.append((key_of(parse(line)), "missing caption" if place is None else "empty caption"))
    return Usable(tuple(kept), tuple(bad))


def _caption_exts(listing: Listing) -> list[str]:
    """The extensions a caption could have here. An uncommon one is counted when it is asked for."""
    found = Counter(m.ext for sample in listing.samples[:64] for m in sample if m.ext not in IMAGE_EXTS)
    return [ext for ext, _ in found.most_common(8)]


def _quoted_name(member: Member) -> str:
    return _quote(f"{member.name}\0{member.stored_as}" if member.stored_as else member.name)


def _quote(text: str) -> str:
    return re.sub(r"[\s%\0]", lambda match: quote(match[0]), text)


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape") if "%" in text else text
