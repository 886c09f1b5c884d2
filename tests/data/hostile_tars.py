"""Tars as no honest program writes them, block by block.

tar = member("../../etc/passwd", b"root", kind=b"2", link="/etc/passwd") + member("0.jpg", image) + END
"""

from __future__ import annotations

BLOCK = 512
END = b"\0" * (2 * BLOCK)


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"", magic: bytes = b"ustar\x0000") -> bytes:
    """A block with a right checksum around any fields; `size` is 12 bytes as they stand."""
    block = bytearray(BLOCK)
    block[0:100] = name[:100].ljust(100, b"\0")
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[148:156] = size[:12].ljust(12, b"\0"), b"00000000000\0", b"        "
    block[156:157], block[157:257] = kind, link[:100].ljust(100, b"\0")
    block[257:265] = magic[:8].ljust(8, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def member(
    name: str | bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"", size: bytes | None = None
) -> bytes:
    """A header and its padded data; `size` says something else than the data."""
    encoded = name.encode(errors="surrogateescape") if isinstance(name, str) else name
    return header(encoded, octal(len(data)) if size is None else size, kind, link) + padded(data)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % BLOCK)


def pax(**records: str | bytes) -> bytes:
    """An extended header for the member that follows."""
    return member("pax", b"".join(record(key.encode(), value) for key, value in records.items()), kind=b"x")


def record(key: bytes, value: str | bytes) -> bytes:
    rest = b" " + key + b"=" + (value.encode(errors="surrogateescape") if isinstance(value, str) else value) + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def long_name(name: bytes) -> bytes:
    """GNU's."""
    return member("././@LongLink", name + b"\0", kind=b"L")
