"""A look at an encoded picture before it is decoded: is it one we can read, whole, and not too large? Which decoder?

Decoding is the dear part, and one undecodable picture fails a whole decoder batch. Most bad files show it in
their first and last bytes, at about 0.1 ms each. A file of a few bytes can claim any number of pixels, and decoders
take memory for what is claimed: the limit is held against the header, before anything is decoded.

    refusal(b"<!DOCTYPE html>...", max_pixels=50_000_000)     # "web page"
    is_for_pillow(transparent_png)                            # True: DALI would drop its alpha

The loader, evaluation and the folder converter all ask `refusal`: what one of them refuses here, none of them reads.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from data.claimed_sizes import (
    APP1,
    BITS,
    END,
    ORIENTATION,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SCAN,
    TILE_WIDTH,
    claimed_pixels,
    jpeg_segments,
    png_chunks,
    tiff_numbers,
    webp_chunks,
)
from data.picture_types import READ_TYPES, sniff

_MOST_SCANS = 64  # of a JPEG: honest ones have about ten, and every one goes through all of the picture
_ALPHA_FLAG, _EXIF_FLAG, _MOVING_FLAG = 0x10, 0x08, 0x02  # of a WebP's VP8X chunk
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_START = b"Exif\0\0"
# Modes of Pillow that DALI decodes rightly from a TIFF; 16-bit grey only where 0 is black.
_TIFF_OF_DALI = frozenset(["L", "RGB", "P", "CMYK", "YCbCr", "I;16", "I;16B"])
_UNUSABLE_SAMPLES = {2: "signed pixels", 3: "floating-point pixels"}  # by TIFF's SampleFormat: no value is white


def refusal(data: bytes, max_pixels: int) -> str | None:
    """Why the picture must not reach a decoder, in a few words; None when it may."""
    kind = sniff(data)
    if kind not in READ_TYPES:
        return kind
    if kind == "avif" and not AvifImagePlugin.SUPPORTED:
        return "avif image"  # a Pillow without libavif
    if claimed_pixels(kind, data) > max_pixels:
        return "too many pixels"
    if kind == "jpeg" and _has_too_many_scans(data):
        return "too many scans"
    if kind == "png":
        return _png_fault(data)
    try:
        image = opened(kind, without_metadata(kind, data))
        width, height = image.size
        fault = _tiff_fault(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    except Exception as error:  # the plugins raise anything on hostile bytes, and all of it means this
        return "unsupported tiff pixels" if "unknown pixel mode" in str(error) else "corrupt header"
    if width * height > max_pixels:
        return "too many pixels"
    return fault or (None if _IS_WHOLE[kind](data) else "truncated image")


def is_for_pillow(data: bytes) -> bool:
    """Whether Pillow decodes this picture: DALI does not read its kind, drops its alpha, shows it wrongly or crashes.

    Of a picture that `refusal` let pass. Where EXIF stands twice, in a moving PNG or in a TIFF of tiles, DALI sizes a
    picture by one reader and turns it by another, beyond the ends of its memory.
    """
    kind = sniff(data)
    if kind == "jpeg":
        return len(_exifs(kind, data)) > 1
    if kind == "png":
        return _has_png_alpha(data) or len(exifs := _exifs(kind, data)) > 1 or (bool(exifs) and is_moving(data))
    if kind == "webp":
        return _is_webp_for_pillow(data)
    if kind in ("bmp", "tiff"):
        try:
            return _is_wrong_in_dali(opened(kind, data))
        except Exception:  # it was not asked for a refusal: DALI finds out
            return False
    return kind in ("avif", "gif")


def has_deep_alpha(data: bytes) -> bool:
    """Whether it is a PNG or TIFF with alpha and 16 bits a channel, of which Pillow cuts the lower eight off."""
    kind = sniff(data)
    if kind == "png":
        return data[24] == 16 and _has_png_alpha(data)
    if kind != "tiff":
        return False
    image = opened(kind, data)
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    return image.mode == "RGBA" and max(image.tag_v2.get(BITS, (8,))) == 16


def opened(kind: str, data: bytes) -> Image.Image:
    """Pillow's view of the header. Raises anything on hostile bytes.

    The plugins' own classes, not Image.open: that one tries every format and warns about large pictures, which are ours
    to refuse.
    """
    image: Image.Image = _PLUGINS[kind](io.BytesIO(data))
    return image


def without_metadata(kind: str, data: bytes) -> bytes:
    """A PNG or WebP of the picture alone; other kinds as they are.

    Text of any length, profiles and chunks that a writer did not fill up make Pillow refuse a whole picture for them.
    """
    if kind == "png":
        kept = [data[at - 8 : at + length + 4] for kind, at, length in png_chunks(data) if kind in _PNG_PIXELS]
        return data[:8] + b"".join(kept)
    if kind != "webp" or data[12:16] != b"VP8X" or data[20] & _MOVING_FLAG:
        return data
    flags = bytes([data[20] & _ALPHA_FLAG])
    chunks = [b"VP8X\x0a\0\0\0" + flags + data[21:30]]
    for name, start, length in webp_chunks(data):
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            chunks += [data[start - 8 : start + length], bytes(length % 2)]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def is_moving(data: bytes) -> bool:
    """Whether a PNG or WebP has several frames, of which the first is shown."""
    if sniff(data) == "png":
        return any(kind == b"acTL" for kind, _, _ in png_chunks(data))
    return sniff(data) == "webp" and data[12:16] == b"VP8X" and bool(data[20] & _MOVING_FLAG)


def orientation(kind: str, data: bytes) -> int:
    """How a JPEG, PNG or WebP is to be turned, by the numbers of EXIF; 1 for not at all.

    As DALI reads it, so that all decoders turn alike: the first EXIF counts, its number as 16 bits, and neither XMP nor
    the text in which some PNGs hide EXIF.
    """
    found = next(iter(_exifs(kind, data)), b"")
    return next((number for tag, number in tiff_numbers(found, "H") if tag == ORIENTATION), 1)


def _exifs(kind: str, data: bytes) -> list[bytes]:
    """Every EXIF of a picture, in order."""
    if kind == "jpeg":
        found = []
        for marker, start, length in jpeg_segments(data):
            if marker == SCAN:
                break
            if marker == APP1 and data.startswith(_EXIF_START, start):
                found.append(data[start : start + length].removeprefix(_EXIF_START))
        return found
    if kind == "png":
        return [data[start : start + length] for kind, start, length in png_chunks(data) if kind == b"eXIf"]
    if kind == "webp" and data[12:16] == b"VP8X" and data[20] & _EXIF_FLAG:
        chunks = [data[start : start + length] for kind, start, length in webp_chunks(data) if kind == b"EXIF"]
        return [chunk.removeprefix(_EXIF_START) for chunk in chunks]  # which only a JPEG should have
    return []


def has_damaged_chunk(data: bytes) -> bool:
    """Whether a checksum of a PNG's pixels does not hold: Pillow does not look at it, and shows other pixels."""
    return any(
        zlib.crc32(data[start - 4 : start + length]) != int.from_bytes(data[start + length : start + length + 4], "big")
        for kind, start, length in png_chunks(data)
        if kind in _PNG_PIXELS[:-1]
    )


def _has_too_many_scans(data: bytes) -> bool:
    """Of the picture itself: the bytes of a scan's marker occur by chance in films and profiles."""
    if data.count(b"\xff\xda") <= _MOST_SCANS:
        return False
    scans = 0
    for marker, _, _ in jpeg_segments(data):
        scans += marker == SCAN
        if scans > _MOST_SCANS:
            return True
    return False


def _is_whole_jpeg(data: bytes) -> bool:
    """It ends with the marker of the end, or has one where its last scan ends; anything may follow that."""
    return data.endswith(b"\xff\xd9") or any(marker == END for marker, _, _ in jpeg_segments(data))


def _png_fault(data: bytes) -> str | None:
    header = next(png_chunks(data), None)
    if header is None or header[0] != b"IHDR" or header[2] != 13 or len(data) < 33:
        return "corrupt header"
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return "corrupt header"
    is_whole = data[-8:-4] == b"IEND" or any(kind == b"IEND" for kind, _, _ in png_chunks(data))
    return None if is_whole else "truncated image"


def _is_whole_webp(data: bytes) -> bool:
    """Its pixels are there; of what follows them a writer may have left out the last filling byte."""
    end = int.from_bytes(data[4:8], "little") + 8
    pixels = [start + length for kind, start, length in webp_chunks(data) if kind in (b"VP8 ", b"VP8L", b"ANMF")]
    return len(data) >= end or (bool(pixels) and max(pixels) <= len(data))


def _is_whole_bmp(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[2:6], "little")


def _tiff_fault(image: TiffImagePlugin.TiffImageFile) -> str | None:
    for sample_format in image.tag_v2.get(SAMPLE_FORMAT, ()):
        if sample_format in _UNUSABLE_SAMPLES:
            return _UNUSABLE_SAMPLES[sample_format]
    return "32-bit pixels" if image.mode == "I" else None


def _has_png_alpha(data: bytes) -> bool:
    if data[25:26] in (b"\4", b"\6"):  # the colour types of grey and RGB with alpha
        return True
    for kind, _, _ in png_chunks(data):
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
    return False


def _is_webp_for_pillow(data: bytes) -> bool:
    """It has alpha or EXIF: looking for the latter DALI does not skip the byte that fills up a chunk of odd length."""
    if data[12:16] == b"VP8L":
        return bool(int.from_bytes(data[21:25], "little") >> 28 & 1)
    return data[12:16] == b"VP8X" and bool(data[20] & (_ALPHA_FLAG | _EXIF_FLAG))


def _is_wrong_in_dali(image: Image.Image) -> bool:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.has_transparency_data
    if TILE_WIDTH in image.tag_v2 and image.tag_v2.get(ORIENTATION, 1) != 1:
        return True
    is_white_zero = image.mode.startswith("I") and image.tag_v2.get(PHOTOMETRIC) == 0
    return image.mode not in _TIFF_OF_DALI or is_white_zero or image.tag_v2.get(BITS) == (12,)


_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
    "gif": GifImagePlugin.GifImageFile,
}
_IS_WHOLE: dict[str, Callable[[bytes], bool]] = {
    "jpeg": _is_whole_jpeg,
    "webp": _is_whole_webp,
    "bmp": _is_whole_bmp,
    # no end marker that can be relied on: the decoder finds out
    "tiff": lambda data: True,
    "avif": lambda data: True,
    "gif": lambda data: True,
}
