"""Image file types: which are supported, their extensions, and detection by magic bytes.

The only table of types: shards (member names), image folders (file names) and the check of each image's bytes use it.

    is_image_name("a/CAT.JFIF")                # True
    unsupported_type("a/cat.heic")             # "heic image": an image type that no decoder here reads
    sniff(b"\\xff\\xd8\\xff\\xe0...")               # "jpeg", whatever the file name
"""

from __future__ import annotations

# Type -> extensions. Their order is the order of preference where a sample of a shard has several pictures.
SUPPORTED_TYPES: dict[str, tuple[str, ...]] = {
    "jpeg": ("jpg", "jpeg"),
    "png": ("png",),
    "webp": ("webp",),
    "bmp": ("bmp",),
    "tiff": ("tif", "tiff"),
    "avif": ("avif",),
    "gif": ("gif",),
}
_RARE_EXTS = {"jpeg": ("jfif", "jpe"), "bmp": ("dib",), "png": ("apng",)}  # rarer extensions, after all others
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
_MOST_BRANDS = 64


def is_image_name(name: str) -> bool:
    """Whether the extension is that of a supported image type; the bytes decide (`sniff`)."""
    return extension_of(name) in IMAGE_EXTS


def unsupported_type(name: str) -> str | None:
    """Return the reason to refuse a file by its extension, an image type that is not supported; else None."""
    return _UNSUPPORTED_EXTS.get(extension_of(name))


def extension_of(name: str) -> str:
    """Return the extension after the last dot in lower case; "" without one. `a/CAT.tar.JPG` -> `jpg`"""
    _, dot, extension = name[name.rfind("/") + 1 :].rpartition(".")
    return extension.lower() if dot else ""


def sniff(data: bytes) -> str:
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
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MOST_BRANDS)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, end - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "avif"
    if brands & _HEIC_BRANDS:
        return "heic image"
    return "camera raw image" if b"crx " in brands else "video"
