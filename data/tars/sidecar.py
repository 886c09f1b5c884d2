"""The sidecar index of a tar shard: where each sample's bytes lie, and what was set aside and why.

The format is DALI's `wds2idx` v1.2, so one file serves this loader and DALI's own webdataset reader. With one
sample of a 12 kB picture and a 30-byte caption:

    v1.2 1
    jpg 512 12000 000000000.jpg txt 13312 30 000000000.txt
    # {"crc32": [..., ...], "of": {"tar_bytes": 20480, "set_aside": [["000000001", "empty image"]], "usable": ...}}

DALI reads as many lines as the first one says; the last line is ours. It makes a stale index visible
(tar_bytes) and gives the counts of a shard from the file's end, so that opening thousands of shards does not
parse them. Its checksums, of the lines above and of itself, make a damaged index visible: it is written anew.

White space and % in names are written as %20 and so on, because DALI separates fields by spaces.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from data.tars.listing import IMAGE_EXTS, Listing, Member, key_of

_VERSION = "v1.2"
_TAIL_BYTES = 1 << 14


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
            Member(_unquote(ext), int(offset), int(size), _unquote(name)) for ext, offset, size, name in fields
        )
    except ValueError:
        raise Damaged(f"not a line of an index: {line[:80]!r}") from None


def write(listing: Listing, tar_bytes: int, target: Path) -> dict[str, Any]:
    """Writes the sidecar under a temporary name and renames it: several ranks may index one shard at once.

    Gives what `read_trailer` will.
    """
    lines = [
        " ".join(f"{_quote(m.ext)} {m.offset} {m.size} {_quote(m.name)}" for m in sample) for sample in listing.samples
    ]
    counts = {ext: _usable(lines, listing.set_aside, ext or None) for ext in ["", *_caption_exts(listing)]}
    trailer = {
        "tar_bytes": tar_bytes,
        "set_aside": listing.set_aside,
        "usable": {ext: [len(u.lines), Counter(reason for _, reason in u.bad)] for ext, u in counts.items()},
    }
    text = "".join(f"{line}\n" for line in (f"{_VERSION} {len(lines)}", *lines)).encode(errors="surrogateescape")
    last = {"crc32": [zlib.crc32(text), _crc32_of(trailer)], "of": trailer}
    partial = target.with_name(f"{target.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        with partial.open("xb") as file:
            file.write(text + f"# {json.dumps(last)}\n".encode())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return trailer


def read(sidecar: Path, caption_ext: str | None) -> Usable:
    """A sidecar that `read_trailer` accepts; `caption_ext` None: no caption is needed.

    Raises Damaged, and FileNotFoundError where another process is writing it anew.
    """
    text, mark, last = sidecar.read_bytes().rpartition(b"\n# ")
    last_line = _last_line(last)
    if not mark or last_line is None or zlib.crc32(text + b"\n") != last_line["crc32"][0]:
        raise Damaged(f"{sidecar} is damaged")
    lines = text.decode(errors="surrogateescape").split("\n")[1:]
    try:
        return _usable(lines, last_line["of"]["set_aside"], caption_ext)
    except (ValueError, IndexError):
        raise Damaged(f"{sidecar} holds lines that are none") from None


def read_trailer(sidecar: Path, tar: Path | None, tar_bytes: int | None = None) -> dict[str, Any] | None:
    """Our last line of a sidecar; None when there is no such file, it is foreign, damaged, or older than its tar."""
    try:
        with sidecar.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            if b"\n# " not in tail:  # a long list of bad samples
                file.seek(0)
                tail = file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None
    _, mark, last = tail.rpartition(b"\n# ")
    last_line = _last_line(last) if mark else None
    if last_line is None:
        return None
    trailer: dict[str, Any] = last_line["of"]
    if tar is not None:
        status = tar.stat()
        if status.st_mtime_ns > sidecar.stat().st_mtime_ns:
            return None
        tar_bytes = status.st_size
    return trailer if tar_bytes in (None, trailer["tar_bytes"]) else None


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
        is_count(trailer["tar_bytes"])
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
        sizes = [size for ext, size in zip(fields[::4], fields[2::4], strict=True) if ext == wanted]
        if sizes and sizes[0] != "0":
            kept.append(line)
        else:
            bad.append((key_of(_unquote(fields[3])), "empty caption" if sizes else "missing caption"))
    return Usable(tuple(kept), tuple(bad))


def _caption_exts(listing: Listing) -> list[str]:
    """The extensions a caption could have here. An uncommon one is counted when it is asked for."""
    found = Counter(m.ext for sample in listing.samples[:64] for m in sample if m.ext not in IMAGE_EXTS)
    return [ext for ext, _ in found.most_common(8)]


def _quote(text: str) -> str:
    return re.sub(r"[\s%]", lambda match: quote(match[0]), text)


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape") if "%" in text else text
