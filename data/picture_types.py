"""The types of picture files: which are read, under which extensions, and how the bytes tell them apart.

The one table: shards (member names), image folders (file names) and the check of every picture's bytes take it from
here.

    is_picture_name("a/CAT.JFIF")                # True
    refused_name("a/cat.heic")                   # "heic image": a picture, of a type that no decoder here reads
    sniff(b"\\xff\\xd8\\xff\\xe0...")               # "jpeg", whatever the file is called
"""

from __future__ import annotations

# Type -> extensions. Their order is the order of preference where a sample of a shard has several pictures.
READ_TYPES: dict[str, tuple[str, ...]] = {
    "jpeg": ("jpg", "jpeg"),
    "png": ("png",),
    "webp": ("webp",),
    "bmp": ("bmp",),
    "tiff": ("tif", "tiff"),
    "avif": ("avif",),
    "gif": ("gif",),
}
_ALSO = {"jpeg": ("jfif", "jpe"), "bmp": ("dib",), "png": ("apng",)}  # rarer extensions, after all others
IMAGE_EXTS = (
    *(ext for exts in READ_TYPES.values() for ext in exts),
    *(ext for exts in _ALSO.values() for ext in exts),
)
# The reason under which a file is refused -> its extensions.
REFUSED_TYPES: dict[str, tuple[str, ...]] = {
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
_REFUSED_NAMES = {ext: reason for reason, exts in REFUSED_TYPES.items() for ext in exts}

_STARTS = {
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
_AVIF = frozenset([b"avif", b"avis"])
_HEIC = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"])
_MOST_BRANDS = 64


def is_picture_name(name: str) -> bool:
    """Whether a file of this name may be a picture of a type that is read; what it really is, its bytes show."""
    return extension_of(name) in IMAGE_EXTS


def refused_name(name: str) -> str | None:
    """The reason to refuse a file whose name says a picture type that is not read; None for all other names."""
    return _REFUSED_NAMES.get(extension_of(name))


def extension_of(name: str) -> str:
    """What follows the last dot, in small letters; empty without one. `a/CAT.tar.JPG` -> `jpg`"""
    _, dot, extension = name[name.rfind("/") + 1 :].rpartition(".")
    return extension.lower() if dot else ""


def sniff(data: bytes) -> str:
    """The type by the first bytes: a key of READ_TYPES; else the reason to refuse it."""
    for start, found in _STARTS.items():
        if data.startswith(start):
            return found
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return _by_brands(data)
    if not data:
        return "empty image"
    text = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"<"):
        return "not an image"
    return "svg image" if b"<svg" in data[:4096].lower() and b"<html" not in data[:4096].lower() else "web page"


def _by_brands(data: bytes) -> str:
    """Of a file in boxes, as ISO 14496-12 has them: what the brands of its first box say."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MOST_BRANDS)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, end - 3, 4))}
    if brands & _AVIF:
        return "avif"
    if brands & _HEIC:
        return "heic image"
    return "camera raw image" if b"crx " in brands else "video"
