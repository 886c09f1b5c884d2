"""The headers of a tar, one after the other: a reader that no file can stop, mislead into a loop, or make hold much.

    headers = walk(Path("00000.tar"))
    headers.entries[0]          # Entry("000000000.jpg", is_file=True, is_folder=False, offset=512, size=12000)
    headers.damage              # unreadable parts, offset -> number of bytes: {} or {1048576: 4096}

Python's tarfile ends a listing at the first damaged header as if the archive ended there, follows chains of long names
into recursion, and reads extended headers of any size, some in quadratic time. Here a walk only goes forward, holds a
header at a time, and after damage goes on at the next block that is one (ustar's magic and checksum).

Formats: v7, ustar, GNU (long names, sizes in base 256, sparse files), pax. Names are UTF-8, odd bytes as surrogates.
Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". tests/data holds it against
tarfile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512
LONGEST_NAME = 4096  # bytes: no file system takes more, so no honest tar has more
_MAGIC = slice(257, 262)
_MOST_EXTENDED_BYTES = 1 << 16  # of a pax header: a path and some times; what is larger is refused with its member
_SCAN_BYTES = 1 << 20  # read at a time when looking for the next header
_NO_DATA = b"123456"  # links, devices, directories, pipes: their size says nothing
_FILES = (b"0", b"\0", b"7")
_RECORD_BYTES = 20 * BLOCK  # tar pads an archive to whole records of this size
_MOST_END_BYTES = 1 << 20  # zeros that may end a tar: two blocks and the padding of the longest record


@dataclass(frozen=True)
class Entry:
    """One member: `size` bytes from `offset` on. `is_file`: a plain one; no link, device, directory or sparse file.

    `link_target`: for a hard link, the name of the member that holds its bytes. `is_broken`: its extended header is
    unreadable, so that its name and size may be wrong.
    """

    name: str
    is_file: bool
    is_folder: bool
    offset: int
    size: int
    link_target: str = ""
    is_broken: bool = False


@dataclass
class Headers:
    """The members with readable headers, in order, and the unreadable parts between them."""

    entries: list[Entry] = field(default_factory=list)
    damage: dict[int, int] = field(default_factory=dict)  # offset -> bytes up to the next header
    is_cut_off: bool = False  # the last entry's sample may have lost members
    num_zero_bytes: int = 0  # after the last member, if more than end a tar: an interrupted copy


@dataclass(frozen=True)
class _Block:
    """A header block by itself."""

    name: str
    kind: bytes
    size: int
    is_extended: bool  # GNU sparse: more blocks of the map follow
    link: str = ""


@dataclass
class _Told:
    """What extended headers say of the member that follows."""

    name: str | None = None
    size: int | None = None
    link: str | None = None
    is_sparse: bool = False
    is_broken: bool = False


class NotATar(ValueError):
    """No block of the file is a tar header."""


def walk(tar: Path) -> Headers:
    """Goes through the headers, not the data. Raises NotATar, and OSError where the file cannot be read."""
    found, told, offset = Headers(), _Told(), 0
    with _descriptor(tar) as number:
        tar_bytes = os.fstat(number).st_size
        while offset < tar_bytes:
            raw = os.pread(number, BLOCK, offset)
            block = parse(raw)
            if block is None:
                after = _next_header(number, offset + BLOCK)
                if not offset and after is None and any(raw):
                    raise NotATar(f"{tar}: no block of it is a tar header")
                if len(raw) < BLOCK:
                    found.is_cut_off |= any(raw)
                elif after is not None and _is_archive_end(number, offset, after):
                    pass  # another tar begins here: `cat a.tar b.tar`
                elif after is not None or any(raw):
                    found.damage[offset] = (tar_bytes if after is None else after) - offset
                elif tar_bytes - offset > _MOST_END_BYTES:
                    found.is_cut_off, found.num_zero_bytes = True, tar_bytes - offset
                told, offset = _Told(), tar_bytes if after is None else after
                continue
            data = offset + BLOCK
            offset = data + (0 if block.kind in _NO_DATA else -(-block.size // BLOCK) * BLOCK)
            if block.kind in (b"L", b"K", b"x", b"g"):
                _listen(told, block, os.pread(number, min(block.size, _MOST_EXTENDED_BYTES), data))
                continue
            if told.size is not None and block.kind not in _NO_DATA:
                offset = data + -(-told.size // BLOCK) * BLOCK
            while block.kind == b"S" and block.is_extended and offset < tar_bytes:
                block = _Block(block.name, block.kind, block.size, os.pread(number, BLOCK, data)[504:505] > b"\0")
                data, offset = data + BLOCK, offset + BLOCK
            _enter(found, block, told, data)
            told = _Told()
    found.is_cut_off |= offset > tar_bytes
    return found


def _is_archive_end(number: int, offset: int, after: int) -> bool:
    """Whether a gap between two headers is a tar's end: two blocks of zeros, and zeros up to a whole record."""
    gap = after - offset
    is_padding = after % _RECORD_BYTES == 0 and 2 * BLOCK <= gap <= _RECORD_BYTES + BLOCK
    return is_padding and not any(os.pread(number, gap, offset))


def parse(raw: bytes) -> _Block | None:
    """A header block of 512 bytes; None for anything else, a block of zeros too."""
    if len(raw) != BLOCK:
        return None
    size, written = _number(raw[124:136]), _number(raw[148:156])
    if size is None or written is None or not _sums_to(raw, written):
        return None
    name, prefix, kind = _text(raw[:100]), _text(raw[345:500]), raw[156:157]
    has_prefix = prefix and raw[257:265] == b"ustar\x0000"
    if kind in (b"0", b"\0") and name.endswith("/"):
        kind = b"5"  # v7 had no type for directories
    return _Block(f"{prefix}/{name}" if has_prefix else name, kind, size, raw[482:483] > b"\0", _text(raw[157:257]))


def _sums_to(raw: bytes, written: int) -> bool:
    """The checksum, over bytes without a sign or, as some old writers had it, with one."""
    total = 256 + sum(raw) - sum(raw[148:156])
    if total == written:
        return True
    return total - 256 * sum(byte > 127 for byte in raw[:148] + raw[156:]) == written


def _number(raw: bytes) -> int | None:
    """Octal digits or, after a first byte of 128, base 256. None for others, and for numbers past 63 bits."""
    if raw[0] == 128:
        value = int.from_bytes(raw[1:], "big")
        return value if value < 2**63 else None
    digits = raw.partition(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _listen(told: _Told, block: _Block, data: bytes) -> None:
    """Take in a GNU long name or a pax header; headers for all members have no effect here."""
    if block.kind == b"L":
        told.name = _text(data[: LONGEST_NAME + 1])
    elif block.kind == b"K":
        told.link = _text(data[: LONGEST_NAME + 1])
    elif block.kind == b"x":
        _listen_to_pax(told, data, block.size)


def _listen_to_pax(told: _Told, data: bytes, size: int) -> None:
    """Records of the form `LENGTH KEY=VALUE\n`."""
    told.is_broken |= len(data) < size
    start = 0
    while start < len(data) and not told.is_broken:
        digits = data[start : start + 20].partition(b" ")[0]
        end = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[start + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(data):
            told.is_broken = True
        elif key == b"path":
            told.name = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"linkpath":
            told.link = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"size":
            told.size = int(value[:-1]) if value[:-1].isdigit() and len(value) < 20 else None
            told.is_broken |= told.size is None
        told.is_sparse |= key.startswith(b"GNU.sparse.")
        start = end


def _enter(found: Headers, block: _Block, told: _Told, data: int) -> None:
    name = block.name if told.name is None else told.name
    size = block.size if told.size is None else told.size
    link = block.link if told.link is None else told.link
    is_folder = block.kind == b"5"
    is_file = block.kind in _FILES and not told.is_sparse and not told.is_broken
    target = link if block.kind == b"1" and not told.is_broken else ""
    name = name.rstrip("/") if is_folder else name
    found.entries.append(Entry(name, is_file, is_folder, data, size, target, told.is_broken))


def _next_header(number: int, offset: int) -> int | None:
    """Where the next block stands that is a header with ustar's magic; None: nowhere."""
    while chunk := os.pread(number, _SCAN_BYTES, offset):
        start = chunk.find(b"ustar")
        while start >= 0:
            begin = start - _MAGIC.start
            if begin >= 0 and begin % BLOCK == 0 and parse(chunk[begin : begin + BLOCK]):
                return offset + begin
            start = chunk.find(b"ustar", start + 1)
        offset += len(chunk) if len(chunk) < BLOCK else len(chunk) // BLOCK * BLOCK
    return None


@contextmanager
def _descriptor(tar: Path) -> Iterator[int]:
    number = os.open(tar, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)
