"""Read the headers of a tar, robust against any file: no exception, loop or memory use that hostile bytes could cause.

    headers = read_tar_headers(Path("00000.tar"))
    headers.entries[0]          # TarEntry("000000000.jpg", is_file=True, is_folder=False, offset=512, size=12000)
    headers.damage              # unreadable parts, offset -> number of bytes: {} or {1048576: 4096}

Python's tarfile ends a listing at the first damaged header as if the archive ended there, follows chains of long names
into recursion, and reads extended headers of any size, some in quadratic time. This reader only goes forward, holds one
header at a time, and after damage continues at the next block that is a header (ustar's magic and checksum).

Formats: v7, ustar, GNU (long names, sizes in base 256, sparse files), pax. Names are UTF-8, odd bytes as surrogates.
Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". tests/data compares it with
tarfile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512
MAX_NAME_BYTES = 4096  # no file system takes more, so no honest tar has more
_MAGIC = slice(257, 262)
_MAX_EXTENDED_BYTES = 1 << 16  # of a pax header: a path and some times; a larger one makes its member unusable
_SCAN_BYTES = 1 << 20  # read at a time when searching for the next header
_NO_DATA = b"123456"  # types without data, whatever their size: links, devices, directories, pipes
_FILES = (b"0", b"\0", b"7")
_RECORD_BYTES = 20 * BLOCK  # tar pads an archive to whole records of this size
_MAX_END_BYTES = 1 << 20  # zeros that may end a tar: two blocks and the padding of the longest record


@dataclass(frozen=True)
class TarEntry:
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
class TarHeaders:
    """The members with readable headers, in order, and the unreadable parts between them."""

    entries: list[TarEntry] = field(default_factory=list)
    damage: dict[int, int] = field(default_factory=dict)  # offset -> bytes up to the next header
    is_cut_off: bool = False  # the last entry's sample may have lost members
    num_zero_bytes: int = 0  # after the last member, if more than end a tar: an interrupted copy


@dataclass(frozen=True)
class _HeaderBlock:
    """The fields of one header block."""

    name: str
    type: bytes
    size: int
    is_extended: bool  # GNU sparse: more blocks of the map follow
    link: str = ""


@dataclass
class _ExtendedHeader:
    """Values from extended headers that apply to the member after them; None: not given."""

    name: str | None = None
    size: int | None = None
    link: str | None = None
    is_sparse: bool = False
    is_broken: bool = False


class NotATar(ValueError):
    """A file of which no block is a tar header."""


def read_tar_headers(tar: Path) -> TarHeaders:
    """Read all headers of a tar, skipping the data. Raises NotATar, and OSError where the file cannot be read."""
    headers, extended, offset = TarHeaders(), _ExtendedHeader(), 0
    with _opened(tar) as descriptor:
        tar_bytes = os.fstat(descriptor).st_size
        while offset < tar_bytes:
            raw = os.pread(descriptor, BLOCK, offset)
            block = parse_header(raw)
            if block is None:
                after = _next_header(descriptor, offset + BLOCK)
                if not offset and after is None and any(raw):
                    raise NotATar(f"{tar}: no block of it is a tar header")
                if len(raw) < BLOCK:
                    headers.is_cut_off |= any(raw)
                elif after is not None and _is_archive_end(descriptor, offset, after):
                    pass  # another tar begins here: `cat a.tar b.tar`
                elif after is not None or any(raw):
                    headers.damage[offset] = (tar_bytes if after is None else after) - offset
                elif tar_bytes - offset > _MAX_END_BYTES:
                    headers.is_cut_off, headers.num_zero_bytes = True, tar_bytes - offset
                extended, offset = _ExtendedHeader(), tar_bytes if after is None else after
                continue
            data = offset + BLOCK
            offset = data + (0 if block.type in _NO_DATA else -(-block.size // BLOCK) * BLOCK)
            if block.type in (b"L", b"K", b"x", b"g"):
                _read_extended(extended, block, os.pread(descriptor, min(block.size, _MAX_EXTENDED_BYTES), data))
                continue
            if extended.size is not None and block.type not in _NO_DATA:
                offset = data + -(-extended.size // BLOCK) * BLOCK
            while block.type == b"S" and block.is_extended and offset < tar_bytes:
                block = _HeaderBlock(
                    block.name, block.type, block.size, os.pread(descriptor, BLOCK, data)[504:505] > b"\0"
                )
                data, offset = data + BLOCK, offset + BLOCK
            _append_entry(headers, block, extended, data)
            extended = _ExtendedHeader()
    headers.is_cut_off |= offset > tar_bytes
    return headers


def _is_archive_end(descriptor: int, offset: int, after: int) -> bool:
    """Whether a gap between two headers is a tar's end: two blocks of zeros, and zeros up to a whole record."""
    gap = after - offset
    is_padding = after % _RECORD_BYTES == 0 and 2 * BLOCK <= gap <= _RECORD_BYTES + BLOCK
    return is_padding and not any(os.pread(descriptor, gap, offset))


def parse_header(raw: bytes) -> _HeaderBlock | None:
    """Parse a header block of 512 bytes; None for anything else, also for a block of zeros."""
    if len(raw) != BLOCK:
        return None
    size, checksum = _number(raw[124:136]), _number(raw[148:156])
    if size is None or checksum is None or not _matches_checksum(raw, checksum):
        return None
    name, prefix, type_flag = _text(raw[:100]), _text(raw[345:500]), raw[156:157]
    has_prefix = prefix and raw[257:265] == b"ustar\x0000"
    if type_flag in (b"0", b"\0") and name.endswith("/"):
        type_flag = b"5"  # v7 had no type for directories
    return _HeaderBlock(
        f"{prefix}/{name}" if has_prefix else name, type_flag, size, raw[482:483] > b"\0", _text(raw[157:257])
    )


def _matches_checksum(raw: bytes, checksum: int) -> bool:
    """Whether the bytes add up to the checksum, as unsigned bytes or, by some old writers, signed ones."""
    total = 256 + sum(raw) - sum(raw[148:156])
    if total == checksum:
        return True
    return total - 256 * sum(byte > 127 for byte in raw[:148] + raw[156:]) == checksum


def _number(raw: bytes) -> int | None:
    """Parse octal digits or, after a first byte of 128, base 256. None for others, and beyond 63 bits."""
    if raw[0] == 128:
        value = int.from_bytes(raw[1:], "big")
        return value if value < 2**63 else None
    digits = raw.partition(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_extended(extended: _ExtendedHeader, block: _HeaderBlock, data: bytes) -> None:
    """Read a GNU long name or a pax header; global pax headers have no effect here."""
    if block.type == b"L":
        extended.name = _text(data[: MAX_NAME_BYTES + 1])
    elif block.type == b"K":
        extended.link = _text(data[: MAX_NAME_BYTES + 1])
    elif block.type == b"x":
        _read_pax(extended, data, block.size)


def _read_pax(extended: _ExtendedHeader, data: bytes, size: int) -> None:
    """Read records of the form `LENGTH KEY=VALUE\n`."""
    extended.is_broken |= len(data) < size
    start = 0
    while start < len(data) and not extended.is_broken:
        digits = data[start : start + 20].partition(b" ")[0]
        end = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[start + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(data):
            extended.is_broken = True
        elif key == b"path":
            extended.name = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"linkpath":
            extended.link = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"size":
            extended.size = int(value[:-1]) if value[:-1].isdigit() and len(value) < 20 else None
            extended.is_broken |= extended.size is None
        extended.is_sparse |= key.startswith(b"GNU.sparse.")
        start = end


def _append_entry(headers: TarHeaders, block: _HeaderBlock, extended: _ExtendedHeader, offset: int) -> None:
    name = block.name if extended.name is None else extended.name
    size = block.size if extended.size is None else extended.size
    link = block.link if extended.link is None else extended.link
    is_folder = block.type == b"5"
    is_file = block.type in _FILES and not extended.is_sparse and not extended.is_broken
    target = link if block.type == b"1" and not extended.is_broken else ""
    name = name.rstrip("/") if is_folder else name
    headers.entries.append(TarEntry(name, is_file, is_folder, offset, size, target, extended.is_broken))


def _next_header(descriptor: int, offset: int) -> int | None:
    """Return the offset of the next block that is a header with ustar's magic; None without one."""
    while chunk := os.pread(descriptor, _SCAN_BYTES, offset):
        start = chunk.find(b"ustar")
        while start >= 0:
            begin = start - _MAGIC.start
            if begin >= 0 and begin % BLOCK == 0 and parse_header(chunk[begin : begin + BLOCK]):
                return offset + begin
            start = chunk.find(b"ustar", start + 1)
        offset += len(chunk) if len(chunk) < BLOCK else len(chunk) // BLOCK * BLOCK
    return None


@contextmanager
def _opened(tar: Path) -> Iterator[int]:
    descriptor = os.open(tar, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
