"""A look at an encoded picture before it is decoded: is it one we can read, whole, and not too large?

Decoding is the dear part, and one undecodable picture fails a whole decoder batch. Most bad files show it in
their first and last bytes, at about 0.1 ms each. A file of a few bytes can claim any number of pixels, and decoders
take memory for what is claimed: the limit is held against the header, before anything is decoded.

    refusal(b"<!DOCTYPE html>...", max_pixels=50_000_000)     # "web page"
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from data.claimed_sizes import claimed_pixels

_MOST_SCANS = 64  # of a JPEG: honest ones have about ten, and every one goes through all of the picture
_TAIL_BYTES = 1 << 16  # where a PNG's end chunk is looked for: some writers append their own data


def refusal(data: bytes, max_pixels: int) -> str | None:
    """Why the picture must not reach the decoder, in a few words; None when it may."""
    kind = sniff(data)
    if kind not in _OPENERS:
        return kind
    opener, is_whole = _OPENERS[kind]
    if claimed_pixels(kind, data) > max_pixels:
        return "too many pixels"
    if kind == "jpeg" and data.count(b"\xff\xda") > _MOST_SCANS:
        return "too many scans"
    try:
        width, height = opener(io.BytesIO(data)).size
    except Exception:  # the plugins raise anything on hostile bytes, and all of it means this
        return "corrupt header"
    if width * height > max_pixels:
        return "too many pixels"
    return None if is_whole(data) else "truncated image"


def sniff(data: bytes) -> str:
    """The format by its first bytes: jpeg, png, webp, bmp, tiff; else the reason to refuse it."""
    if not data:
        return "empty image"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM"):
        return "bmp"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif image"
    if data[4:8] == b"ftyp":
        return "heif, avif or video"
    return "web page" if data[:512].lstrip().startswith(b"<") else "not an image"


def _whole_jpeg(data: bytes) -> bool:
    """An end marker after the last scan began. Coded pixels cannot hold one, a thumbnail's comes before."""
    return data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _whole_png(data: bytes) -> bool:
    return b"IEND" in data[-_TAIL_BYTES:]


def _whole_riff(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[4:8], "little") + 8


def _whole_bmp(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[2:6], "little")


# The plugins' own classes, not Image.open: that one tries every format and warns about large pictures, which
# are ours to refuse. Pictures are only looked at, never loaded.
_OPENERS: dict[str, tuple[Callable, Callable[[bytes], bool]]] = {
    "jpeg": (JpegImagePlugin.JpegImageFile, _whole_jpeg),
    "png": (PngImagePlugin.PngImageFile, _whole_png),
    "webp": (WebPImagePlugin.WebPImageFile, _whole_riff),
    "bmp": (BmpImagePlugin.BmpImageFile, _whole_bmp),
    "tiff": (TiffImagePlugin.TiffImageFile, lambda data: True),  # no end marker: the decoder finds out
}
