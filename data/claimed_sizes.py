"""How many pixels a picture's header claims, in every place that a decoder may take the size from.

Readers differ in which of two contradicting headers they believe. A TIFF with two widths opens as 24 x 32 in Pillow,
and libtiff hands out 60,000 x 60,000 pixels for it: 10 GB. So the largest claim counts.

    claimed_pixels("jpeg", data)          # 12_000_000, or 0 where nothing is found: then there is nothing to decode
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's SOF markers: tables share their range
_NO_LENGTH = frozenset([0x01, *range(0xD0, 0xD9)])
_SCAN = 0xDA
# TIFF: image width and length, tile width and length; a tile is held whole
_TAGS = {256: "width", 257: "height", 322: "width", 323: "height"}
_MOST_TAGS = 4096


def claimed_pixels(kind: str, data: bytes) -> int:
    """The largest number of pixels that a header of this kind of file claims; 0 for kinds with one place for it."""
    if kind == "jpeg":
        return max((width * height for width, height in _jpeg_frames(data)), default=0)
    if kind == "png" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])  # of the first chunk; a second one may say otherwise
        return int(width * height)
    return _tiff_pixels(data) if kind == "tiff" else 0


def _jpeg_frames(data: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) of every frame before the first scan."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            yield width, height
        if marker == _SCAN:
            return
        if marker == 0xFF:  # filling
            place += 1
        else:
            place += 2 + (0 if marker in _NO_LENGTH else int.from_bytes(data[place + 2 : place + 4], "big"))


def _tiff_pixels(data: bytes) -> int:
    """Of the first directory: the widest width by the highest height."""
    order = "<" if data.startswith(b"II") else ">"
    sizes = {"width": 0, "height": 0}
    [start] = struct.unpack(f"{order}I", data[4:8].ljust(4, b"\0"))
    [count] = struct.unpack(f"{order}H", data[start : start + 2].ljust(2, b"\0"))
    for place in range(start + 2, start + 2 + 12 * min(count, _MOST_TAGS), 12):
        if place + 12 > len(data):
            break
        tag, form = struct.unpack(f"{order}HH", data[place : place + 4])
        if tag in _TAGS:
            code = "H" if form == 3 else "I"
            [value] = struct.unpack(f"{order}{code}", data[place + 8 : place + 8 + struct.calcsize(code)])
            sizes[_TAGS[tag]] = max(sizes[_TAGS[tag]], value)
    return sizes["width"] * sizes["height"]
