"""Check encoded images before decoding, choose their decoder, and decode with Pillow those that DALI cannot.

    image_fault(b"<!DOCTYPE html>...", max_pixels=50_000_000)     # "web page"; None for a good image
    needs_pillow(transparent_png)                                # True: DALI would drop its alpha
    decode_with_pillow(gif_bytes)                # a PIL image, upright: L or RGB; RGBA where a pixel is transparent
    blend_on_colour(image, (255, 255, 255))      # RGB

Decoding is expensive, and one undecodable image fails a whole decoder batch. Most bad files show it in their first and
last bytes, at about 0.1 ms each. A file of a few bytes can claim any number of pixels, and decoders allocate what is
claimed: the limit applies to the header, before anything is decoded. The loader, evaluation and the folder converter
all call `image_fault`, and so refuse the same images.

Alpha is kept: the caller chooses the background. Where DALI decodes an image correctly, values agree to one level of
255, and exactly for 8 bits a channel.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
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

from configs.data import Colour
from data.image_headers import (
    APP1,
    BITS_PER_SAMPLE,
    EOI,
    ORIENTATION,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SOS,
    SUPPORTED_TYPES,
    TILE_WIDTH,
    detect_type,
    jpeg_segments,
    max_claimed_pixels,
    png_chunks,
    tiff_tags,
    webp_chunks,
)

_MAX_SCANS = 64  # of a JPEG: honest ones have about ten, and each covers the whole image
_ALPHA_FLAG, _EXIF_FLAG, _ANIMATION_FLAG = 0x10, 0x08, 0x02  # of a WebP's VP8X chunk
_PNG_IMAGE_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_PREFIX = b"Exif\0\0"
# Modes of Pillow that DALI decodes correctly from a TIFF; 16-bit grey only where 0 is black.
_DALI_TIFF_MODES = frozenset(["L", "RGB", "P", "CMYK", "YCbCr", "I;16", "I;16B"])
_UNUSABLE_SAMPLE_FORMATS = {
    2: "signed pixels",
    3: "floating-point pixels",
}  # by TIFF's SampleFormat: no value means white
_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
    "gif": GifImagePlugin.GifImageFile,
}
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_fault(data: bytes, max_pixels: int) -> str | None:
    """Return why an image must not be decoded, in a few words; None where it may be."""
    kind = detect_type(data)
    if kind not in SUPPORTED_TYPES:
        return kind
    if kind == "avif" and not AvifImagePlugin.SUPPORTED:
        return "avif image"  # a Pillow without libavif
    if max_claimed_pixels(kind, data) > max_pixels:
        return "too many pixels"
    if kind == "jpeg" and _has_too_many_scans(data):
        return "too many scans"
    if kind == "png":
        return _png_fault(data)
    try:
        image = open_header(kind, strip_metadata(kind, data))
        width, height = image.size
        fault = _tiff_fault(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    except Exception as error:  # the plugins raise anything on hostile bytes
        return "unsupported tiff pixels" if "unknown pixel mode" in str(error) else "corrupt header"
    if width * height > max_pixels:
        return "too many pixels"
    return fault or (None if _IS_COMPLETE[kind](data) else "truncated image")


def needs_pillow(data: bytes) -> bool:
    """Whether Pillow must decode a good image, which DALI cannot, or shows without alpha, or wrongly, or crashes on.

    With EXIF twice, in an animated PNG or in a tiled TIFF, DALI takes the size and the orientation from different
    parsers, and writes beyond its memory.
    """
    kind = detect_type(data)
    if kind == "jpeg":
        return len(_exif_blocks(kind, data)) > 1
    if kind == "png":
        return _has_png_alpha(data) or len(exifs := _exif_blocks(kind, data)) > 1 or (bool(exifs) and is_animated(data))
    if kind == "webp":
        return _webp_needs_pillow(data)
    if kind in ("bmp", "tiff"):
        try:
            return _is_wrong_in_dali(open_header(kind, data))
        except Exception:  # a malformed file: DALI refuses it
            return False
    return kind in ("avif", "gif")


def has_16_bit_alpha(data: bytes) -> bool:
    """Whether it is a PNG or TIFF with alpha and 16 bits a channel, which Pillow cuts to 8."""
    kind = detect_type(data)
    if kind == "png":
        return data[24] == 16 and _has_png_alpha(data)
    if kind != "tiff":
        return False
    image = open_header(kind, data)
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    return image.mode == "RGBA" and max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) == 16


def open_header(kind: str, data: bytes) -> Image.Image:
    """Open an image with Pillow, reading its header alone. Raises any exception on malformed bytes.

    By the plugins' own classes: Image.open tries every format, and warns about large images, as `image_fault` does.
    """
    image: Image.Image = _PLUGINS[kind](io.BytesIO(data))
    return image


def strip_metadata(kind: str, data: bytes) -> bytes:
    """Remove all but the pixels and what decodes them from a PNG or WebP; return other types unchanged.

    Pillow refuses a whole image for long texts, profiles and chunks without their padding.
    """
    if kind == "png":
        kept = [data[at - 8 : at + length + 4] for kind, at, length in png_chunks(data) if kind in _PNG_IMAGE_CHUNKS]
        return data[:8] + b"".join(kept)
    if kind != "webp" or data[12:16] != b"VP8X" or data[20] & _ANIMATION_FLAG:
        return data
    flags = bytes([data[20] & _ALPHA_FLAG])
    chunks = [b"VP8X\x0a\0\0\0" + flags + data[21:30]]
    for name, start, length in webp_chunks(data):
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            chunks += [data[start - 8 : start + length], bytes(length % 2)]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def is_animated(data: bytes) -> bool:
    """Whether a PNG or WebP has several frames, of which the first is decoded."""
    if detect_type(data) == "png":
        return any(kind == b"acTL" for kind, _, _ in png_chunks(data))
    return detect_type(data) == "webp" and data[12:16] == b"VP8X" and bool(data[20] & _ANIMATION_FLAG)


def exif_orientation(kind: str, data: bytes) -> int:
    """Return the EXIF orientation of a JPEG, PNG or WebP; 1, upright, without one.

    As DALI reads it, so that all decoders agree: the first EXIF block counts, its value as 16 bits; XMP and EXIF in
    text chunks of PNGs do not.
    """
    found = next(iter(_exif_blocks(kind, data)), b"")
    return next((number for tag, number in tiff_tags(found, "H") if tag == ORIENTATION), 1)


def _exif_blocks(kind: str, data: bytes) -> list[bytes]:
    """Return every EXIF block of an image, in order."""
    if kind == "jpeg":
        found = []
        for marker, start, length in jpeg_segments(data):
            if marker == SOS:
                break
            if marker == APP1 and data.startswith(_EXIF_PREFIX, start):
                found.append(data[start : start + length].removeprefix(_EXIF_PREFIX))
        return found
    if kind == "png":
        return [data[start : start + length] for kind, start, length in png_chunks(data) if kind == b"eXIf"]
    if kind == "webp" and data[12:16] == b"VP8X" and data[20] & _EXIF_FLAG:
        chunks = [data[start : start + length] for kind, start, length in webp_chunks(data) if kind == b"EXIF"]
        return [chunk.removeprefix(_EXIF_PREFIX) for chunk in chunks]  # a prefix that is only right in a JPEG
    return []


def has_bad_png_checksum(data: bytes) -> bool:
    """Whether a checksum of a PNG's image chunks is wrong: Pillow ignores it and would decode wrong pixels."""
    return any(
        zlib.crc32(data[start - 4 : start + length]) != int.from_bytes(data[start + length : start + length + 4], "big")
        for kind, start, length in png_chunks(data)
        if kind in _PNG_IMAGE_CHUNKS[:-1]
    )


def _has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG itself has too many scans: the bytes of the marker also occur by chance in films and profiles."""
    if data.count(b"\xff\xda") <= _MAX_SCANS:
        return False
    scans = 0
    for marker, _, _ in jpeg_segments(data):
        scans += marker == SOS
        if scans > _MAX_SCANS:
            return True
    return False


def _is_complete_jpeg(data: bytes) -> bool:
    """Whether a JPEG has an end marker, at the end of the file or after its last scan; anything may follow."""
    return data.endswith(b"\xff\xd9") or any(marker == EOI for marker, _, _ in jpeg_segments(data))


def _png_fault(data: bytes) -> str | None:
    """Return why a PNG's header or end is bad; None for a good one."""
    header = next(png_chunks(data), None)
    if header is None or header[0] != b"IHDR" or header[2] != 13 or len(data) < 33:
        return "corrupt header"
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return "corrupt header"
    is_complete = data[-8:-4] == b"IEND" or any(kind == b"IEND" for kind, _, _ in png_chunks(data))
    return None if is_complete else "truncated image"


def _is_complete_webp(data: bytes) -> bool:
    """Whether a WebP's pixels are complete; some writers leave out the last padding byte after them."""
    end = int.from_bytes(data[4:8], "little") + 8
    pixels = [start + length for kind, start, length in webp_chunks(data) if kind in (b"VP8 ", b"VP8L", b"ANMF")]
    return len(data) >= end or (bool(pixels) and max(pixels) <= len(data))


def _is_complete_bmp(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[2:6], "little")


def _tiff_fault(image: TiffImagePlugin.TiffImageFile) -> str | None:
    """Return why a TIFF's pixels cannot be shown as 8-bit colours; None where they can."""
    for sample_format in image.tag_v2.get(SAMPLE_FORMAT, ()):
        if sample_format in _UNUSABLE_SAMPLE_FORMATS:
            return _UNUSABLE_SAMPLE_FORMATS[sample_format]
    return "32-bit pixels" if image.mode == "I" else None


def _has_png_alpha(data: bytes) -> bool:
    if data[25:26] in (b"\4", b"\6"):  # the colour types of grey and RGB with alpha
        return True
    for kind, _, _ in png_chunks(data):
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
    return False


def _webp_needs_pillow(data: bytes) -> bool:
    """Whether a WebP has alpha or EXIF, for which DALI does not skip the padding of chunks of odd length."""
    if data[12:16] == b"VP8L":
        return bool(int.from_bytes(data[21:25], "little") >> 28 & 1)
    return data[12:16] == b"VP8X" and bool(data[20] & (_ALPHA_FLAG | _EXIF_FLAG))


def _is_wrong_in_dali(image: Image.Image) -> bool:
    """Whether DALI decodes a BMP or TIFF that Pillow has opened without its alpha, turned, or in wrong colours."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.has_transparency_data
    if TILE_WIDTH in image.tag_v2 and image.tag_v2.get(ORIENTATION, 1) != 1:
        return True
    is_white_zero = image.mode.startswith("I") and image.tag_v2.get(PHOTOMETRIC) == 0
    return image.mode not in _DALI_TIFF_MODES or is_white_zero or image.tag_v2.get(BITS_PER_SAMPLE) == (12,)


_IS_COMPLETE: dict[str, Callable[[bytes], bool]] = {
    "jpeg": _is_complete_jpeg,
    "webp": _is_complete_webp,
    "bmp": _is_complete_bmp,
    # no reliable end marker: the decoder detects truncation
    "tiff": lambda data: True,
    "avif": lambda data: True,
    "gif": lambda data: True,
}


class UndecodableImage(Exception):
    """Pillow cannot decode an image; the message is the reason."""


def decode_with_pillow(data: bytes) -> Image.Image:
    """Decode the first frame of an image that `image_fault` accepts. Raises UndecodableImage."""
    kind = detect_type(data)
    if kind not in SUPPORTED_TYPES:
        raise UndecodableImage(kind)
    if kind == "png" and has_bad_png_checksum(data):
        raise UndecodableImage("a checksum is wrong")
    try:
        image = open_header(kind, strip_metadata(kind, data))
        image.load()
        turn = _TRANSPOSES.get(_orientation(kind, data, image))
        upright = _to_8_bits(image, data)
        return upright if turn is None else upright.transpose(turn)
    except Exception as error:  # damage makes Pillow's parsers raise almost anything
        raise UndecodableImage((str(error) or type(error).__name__).splitlines()[0]) from None


def blend_on_colour(image: Image.Image, colour: Colour) -> Image.Image:
    """Convert an image to RGB, blending a transparent one over a colour."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(image, mask=image)
    return canvas


def _orientation(kind: str, data: bytes, image: Image.Image) -> int:
    """Return the orientation to apply. Pillow rotates TIFFs itself, and puts an AVIF's rotation into its EXIF."""
    if kind == "avif":
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION, 1))
    return exif_orientation(kind, data)


def _to_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Convert to 8 bits a channel: L, RGB or, where a pixel is transparent, RGBA."""
    if image.mode.startswith("I;16"):
        return _from_16_bit_grey(image)
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
    if detect_type(data) == "png" and "transparency" in image.info and image.mode in ("L", "RGB"):
        image.info["transparency"] = _to_8_bit_colour(image.info["transparency"], data[24])
    rgba = image.convert("RGBA")
    return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba


def _to_8_bit_colour(key: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """Scale a PNG's transparent colour to 8 bits: Pillow converts the samples, but not this colour."""
    if isinstance(key, tuple):
        return tuple(value >> max(bits - 8, 0) for value in key)
    return key * 255 // (2**bits - 1) if bits < 8 else key


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """Convert grey of 12 or 16 bits to 8, rounding as DALI does; Pillow's conversion clips bright values."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.uint32)
    top = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    grey = np.minimum((values * 255 + top // 2) // top, 255).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    if alpha.all():
        return Image.fromarray(grey)
    return Image.merge("RGBA", [*[Image.fromarray(grey)] * 3, Image.fromarray(alpha)])
