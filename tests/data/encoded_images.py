"""Build encoded images that Pillow does not write, from chunks and segments.

with_png_chunk(saved(image, "PNG"), b"tRNS", b"\0\1")       # the value 1 is transparent
riff(vp8x(0x08, 32, 24), pixels, webp_chunk(b"EXIF", exif(6)))
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<", form: int = 3, prefix: bytes = b"") -> bytes:
    """An EXIF block with an orientation tag."""
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[form], orientation)
    return prefix + start + struct.pack(f"{order}HHHI", 1, 0x0112, form, 1) + value + bytes(4)


def app_segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def with_png_chunk(data: bytes, kind: bytes, payload: bytes, before: bytes = b"IDAT") -> bytes:
    start = data.find(before) - 4
    return data[:start] + png_chunk(kind, payload) + data[start:]


def png(samples: np.ndarray, bits: int, colour_type: int) -> bytes:
    """Encode (height, width, channels) samples of any bit depth as an unfiltered PNG."""
    height, width, _ = samples.shape
    rows = []
    for row in samples.reshape(height, -1):
        digits = "".join(f"{value:0{bits}b}" for value in row.tolist())
        digits += "0" * (-len(digits) % 8)
        rows.append(b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big"))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def webp_chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)


def vp8x(flags: int, width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_tiff_number(data: bytes, tag: int, number: int) -> bytes:
    """Replace the value of a one-value tag in a little-endian TIFF."""
    [start] = struct.unpack("<I", data[4:8])
    [count] = struct.unpack("<H", data[start : start + 2])
    for place in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[place : place + 2]) == (tag,):
            return data[: place + 8] + struct.pack("<H", number) + data[place + 10 :]
    raise AssertionError(f"no tag {tag}")
