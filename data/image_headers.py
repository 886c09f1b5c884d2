"""Image headers without decoding: types by extension and magic bytes, segments, chunks and tags, and claimed sizes.

    is_image_name("a/CAT.JFIF")                        # True
    unsupported_type("a/cat.heic")                     # "heic image": an image type that no decoder here reads
    detect_type(b"\\xff\\xd8\\xff\\xe0...")                # "jpeg", whatever the file name
    max_claimed_pixels("jpeg", data)                   # 12_000_000; 0 where no size is found: nothing to decode
    [kind for kind, _, _ in png_chunks(data)]          # [b"IHDR", b"tEXt", b"IDAT", b"IDAT", b"IEND"]

The only table of types: shards (member names), image folders (file names) and the check of each image's bytes use it.

Readers differ in which of two contradicting headers they believe. A TIFF with two widths opens as 24 x 32 in Pillow,
and libtiff allocates 60,000 x 60,000 pixels for it: 10 GB. So the largest claim counts.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

# Type -> extensions. Their order is the order of preference where a sample of a shard has several images.
SUPPORTED_TYPES: dict[str, tuple[str, ...]] = {
    "jpeg": ("jpg", "jpeg"),
    "png": ("png",),
    "webp": ("webp",),
    "bmp": ("bmp",),
    "tiff": ("tif", "tiff"),
    "avif": ("avif",),
    "gif": ("gif",),
}
_RARE_EXTS = {"jpeg": ("jfif", "jpe"), "bmp": ("dib",), "png": ("apng",)}  # come after all others
IMAGE_EXTS = (
    *(ext for exts in SUPPORTED_TYPES.values() for ext in exts),
    *(ext for exts in _RARE_EXTS.values() for ext in exts),
)
# Reason to refuse a file -> the extensions it applies to.
UNSUPPORTED_TYPES: dict[str, tuple[str, ...]] = {
    "heic image": ("heic", "heif", "hif"),
    "jpeg 2000 image": ("jp2", "j2k", "jpx", "jpf"),
    "jpeg xl image": ("jxl",),
    "svg image": ("svg", "svgz"),
    "photoshop image": ("psd", "psb"),
    "camera raw image": ("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf"),
    "high dynamic range image": ("exr", "hdr"),
    "icon": ("ico", "icns"),
    "netpbm image": ("pbm", "pgm", "ppm", "pnm"),
    "targa image": ("tga",),
}
_UNSUPPORTED_EXTS = {ext: reason for reason, exts in UNSUPPORTED_TYPES.items() for ext in exts}

_MAGIC_BYTES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",  # with 64-bit offsets
    b"MM\0+": "tiff",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\0\0\0\x0cjP  \r\n\x87\n": "jpeg 2000 image",
    b"\xff\x4f\xff\x51": "jpeg 2000 image",
    b"\0\0\0\x0cJXL \r\n\x87\n": "jpeg xl image",
    b"\xff\x0a": "jpeg xl image",
    b"8BPS": "photoshop image",
    b"\x76\x2f\x31\x01": "high dynamic range image",
    b"#?RADIANCE": "high dynamic range image",
    b"#?RGBE": "high dynamic range image",
    b"\0\0\1\0": "icon",
    b"%PDF-": "pdf document",
}
_AVIF_BRANDS = frozenset([b"avif", b"avis"])
_HEIC_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"])
_MAX_BRANDS = 64
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's SOF markers: tables share their range
_NO_LENGTH = frozenset([0x01, 0xD8, 0xD9])
SOS, EOI, APP1 = 0xDA, 0xD9, 0xE1  # JPEG markers: start of scan, end of image, EXIF
# Coded pixels hold 0xFF only before 0 and restart markers; several 0xFF before a marker are padding.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_HEADER_MARKERS = frozenset(range(1, 0xFF)) - frozenset(range(0xD0, 0xD8))
_MAX_SEGMENTS, _MAX_CHUNKS, _MAX_TAGS = 10_000, 1 << 17, 4096  # of one file: each takes a microsecond
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, TILE_WIDTH, SAMPLE_FORMAT = 258, 262, 274, 322, 339  # TIFF's tags
# TIFF: image width and length, tile width and length; a tile is held whole
_SIZE_TAGS = {256: "width", 257: "height", 322: "width", 323: "height"}
_STRUCT_CODES = {1: "B", 3: "H", 16: "Q"}  # TIFF field type -> struct's code; "I" for all others
# (JPEG marker, or name of a PNG or WebP chunk; offset of the payload; its length, which may exceed the end of the file)
Segment = tuple[int, int, int]
Chunk = tuple[bytes, int, int]


def is_image_name(name: str) -> bool:
    """Whether the extension is that of a supported image type; the bytes decide (`detect_type`)."""
    return extension_of(name) in IMAGE_EXTS


def unsupported_type(name: str) -> str | None:
    """Return the reason to refuse a file by its extension, an image type that is not supported; else None."""
    return _UNSUPPORTED_EXTS.get(extension_of(name))


def extension_of(name: str) -> str:
    """Return the extension after the last dot in lower case; "" without one. `a/CAT.tar.JPG` -> `jpg`"""
    _, dot, extension = name[name.rfind("/") + 1 :].rpartition(".")
    return extension.lower() if dot else ""


def detect_type(data: bytes) -> str:
    """Detect the type by the first bytes: a key of SUPPORTED_TYPES, or the reason to refuse the file."""
    for start, found in _MAGIC_BYTES.items():
        if data.startswith(start):
            return found
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return _type_of_brands(data)
    if not data:
        return "empty image"
    text = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"<"):
        return "not an image"
    return "svg image" if b"<svg" in data[:4096].lower() and b"<html" not in data[:4096].lower() else "web page"


def _type_of_brands(data: bytes) -> str:
    """Detect the type of an ISO base media file (ISO 14496-12) by the brands in its first box."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MAX_BRANDS)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "avif"
    if brands & _HEIC_BRANDS:
        return "heic image"
    return "camera raw image" if b"crx " in brands else "video"


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments up to and including the first end of image, skipping coded pixels.

    Thumbnails and profiles are inside segments, and a motion photo's film is after the end: neither is parsed.
    """
    at, size = 2, len(data)
    for _ in range(_MAX_SEGMENTS):
        if at + 1 < size and data[at] == 0xFF and data[at + 1] in _HEADER_MARKERS:
            at += 2  # as between most segments of a header
        elif found := _NEXT_MARKER.search(data, at):
            at = found.end()
        else:
            return
        marker = data[at - 1]
        length = 0 if marker in _NO_LENGTH else int.from_bytes(data[at : at + 2], "big")
        yield marker, at + 2, max(length - 2, 0)
        if marker == EOI:
            return
        at += length


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks up to IEND."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length


def webp_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a RIFF file, to the end that its header gives; each is padded to an even length."""
    at, end = 12, min(len(data), int.from_bytes(data[4:8], "little") + 8)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > end:
            return
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        yield kind, at + 8, length
        at += 8 + length + length % 2


def max_claimed_pixels(kind: str, data: bytes) -> int:
    """Return the largest number of pixels that any header claims; 0 for types whose size is given only once."""
    if kind == "jpeg":
        return max((width * height for width, height in _jpeg_frames(data)), default=0)
    if kind == "png":
        return max((width * height for width, height in _png_headers(data)), default=0)
    return _tiff_pixels(data) if kind == "tiff" else 0


def _jpeg_frames(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (width, height) of every frame before the first scan."""
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
    at, offset, count, entry = (8, "Q", "Q", 20) if is_big else (4, "I", "H", 12)
    start = _read_number(order + offset, data, at)
    first = start + struct.calcsize(count)
    for at in range(first, first + entry * min(_read_number(order + count, data, start), _MAX_TAGS), entry):
        if at + entry > len(data):
            return
        tag, form = struct.unpack(f"{order}HH", data[at : at + 4])
        yield tag, _read_number(order + (code or _STRUCT_CODES.get(form, "I")), data, at + (12 if is_big else 8))


def _tiff_pixels(data: bytes) -> int:
    """Return the largest width times the largest height."""
    sizes = {"width": 0, "height": 0}
    for tag, value in tiff_tags(data):
        if tag in _SIZE_TAGS:
            sizes[_SIZE_TAGS[tag]] = max(sizes[_SIZE_TAGS[tag]], value)
    return sizes["width"] * sizes["height"]


def _read_number(code: str, data: bytes, at: int) -> int:
    """Unpack one number; bytes beyond the end count as 0."""
    size = struct.calcsize(code)
    [value] = struct.unpack(code, data[at : at + size].ljust(size, b"\0"))
    return int(value)
