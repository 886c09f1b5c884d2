"""Walk the segments, chunks and tags of an encoded image, and read the size that its headers claim; no decoding.

Readers differ in which of two contradicting headers they believe. A TIFF with two widths opens as 24 x 32 in Pillow,
and libtiff hands out 60,000 x 60,000 pixels for it: 10 GB. So the largest claim counts.

    claimed_pixels("jpeg", data)          # 12_000_000, or 0 where nothing is found: then there is nothing to decode
    [kind for kind, _, _ in png_chunks(data)]  # [b"IHDR", b"tEXt", b"IDAT", b"IDAT", b"IEND"]
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's SOF markers: tables share their range
_NO_LENGTH = frozenset([0x01, 0xD8, 0xD9])
SOS, EOI, APP1 = 0xDA, 0xD9, 0xE1  # JPEG markers: start of scan, end of image, EXIF
# Coded pixels hold 0xFF only before 0 and restart markers; several 0xFF before a marker are padding.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_HEADER_MARKERS = frozenset(range(1, 0xFF)) - frozenset(range(0xD0, 0xD8))
_MOST_SEGMENTS, _MOST_CHUNKS, _MOST_TAGS = 10_000, 1 << 17, 4096  # of one file: each takes a microsecond
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, TILE_WIDTH, SAMPLE_FORMAT = 258, 262, 274, 322, 339  # TIFF's tags
# TIFF: image width and length, tile width and length; a tile is held whole
_SIZE_TAGS = {256: "width", 257: "height", 322: "width", 323: "height"}
_STRUCT_CODES = {1: "B", 3: "H", 16: "Q"}  # TIFF field type -> struct's code; "I" for all others


# (JPEG marker, or name of a PNG or WebP chunk; offset of the payload; its length, which may exceed the end of the file)
Segment = tuple[int, int, int]
Chunk = tuple[bytes, int, int]


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments up to and including the first end of image, skipping coded pixels.

    Thumbnails and profiles are inside segments, and a motion photo's film is after the end: neither is parsed.
    """
    place, size = 2, len(data)
    for _ in range(_MOST_SEGMENTS):
        if place + 1 < size and data[place] == 0xFF and data[place + 1] in _HEADER_MARKERS:
            place += 2  # as between most segments of a header
        elif found := _NEXT_MARKER.search(data, place):
            place = found.end()
        else:
            return
        marker = data[place - 1]
        length = 0 if marker in _NO_LENGTH else int.from_bytes(data[place : place + 2], "big")
        yield marker, place + 2, max(length - 2, 0)
        if marker == EOI:
            return
        place += length


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks up to IEND."""
    place = 8
    for _ in range(_MOST_CHUNKS):
        if place + 8 > len(data):
            return
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        yield kind, place + 8, length
        if kind == b"IEND":
            return
        place += 12 + length


def webp_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a RIFF file, to the end that its header gives; each is padded to an even length."""
    place, end = 12, min(len(data), int.from_bytes(data[4:8], "little") + 8)
    for _ in range(_MOST_CHUNKS):
        if place + 8 > end:
            return
        kind, length = struct.unpack("<4sI", data[place : place + 8])
        yield kind, place + 8, length
        place += 8 + length + length % 2


def claimed_pixels(kind: str, data: bytes) -> int:
    """The largest number of pixels that a header of this kind of file claims; 0 for kinds with one place for it."""
    if kind == "jpeg":
        return max((width * height for width, height in _jpeg_frames(data)), default=0)
    if kind == "png":
        return max((width * height for width, height in _png_headers(data)), default=0)
    return _tiff_pixels(data) if kind == "tiff" else 0


def _jpeg_frames(data: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) of every frame before the first scan."""
    for marker, start, _ in jpeg_segments(data):
        if marker in _FRAMES and start + 5 <= len(data):
            height, width = struct.unpack(">HH", data[start + 1 : start + 5])
            yield width, height
        if marker == SOS:
            return


def _png_headers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (width, height) of every header before the pixels: there may be two that differ."""
    for kind, start, _ in png_chunks(data):
        if kind == b"IHDR" and start + 8 <= len(data):
            width, height = struct.unpack(">II", data[start : start + 8])
            yield width, height
        if kind == b"IDAT":
            return


def tiff_tags(data: bytes, code: str | None = None) -> Iterator[tuple[int, int]]:
    """Yield (tag, first value) of the first directory of a TIFF, or of EXIF, which has the form of a TIFF.

    The value is meaningless where it is not an integer, or is stored outside the directory. `code`, a code of struct,
    replaces the field types that the tags have.
    """
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")  # 64-bit offsets, counts and values
    place, offset, count, entry = (8, "Q", "Q", 20) if is_big else (4, "I", "H", 12)
    start = _read_number(order + offset, data, place)
    first = start + struct.calcsize(count)
    for place in range(first, first + entry * min(_read_number(order + count, data, start), _MOST_TAGS), entry):
        if place + entry > len(data):
            return
        tag, form = struct.unpack(f"{order}HH", data[place : place + 4])
        yield tag, _read_number(order + (code or _STRUCT_CODES.get(form, "I")), data, place + (12 if is_big else 8))


def _tiff_pixels(data: bytes) -> int:
    """Return the largest width times the largest height."""
    sizes = {"width": 0, "height": 0}
    for tag, value in tiff_tags(data):
        if tag in _SIZE_TAGS:
            sizes[_SIZE_TAGS[tag]] = max(sizes[_SIZE_TAGS[tag]], value)
    return sizes["width"] * sizes["height"]


def _read_number(code: str, data: bytes, place: int) -> int:
    """Unpack one number; bytes beyond the end count as 0."""
    size = struct.calcsize(code)
    [value] = struct.unpack(code, data[place : place + size].ljust(size, b"\0"))
    return int(value)
