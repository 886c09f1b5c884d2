"""Decode images with Pillow: those that DALI cannot decode correctly, and all of the folder converter.

Alpha is kept: the caller chooses the background. Where DALI decodes an image correctly, values agree to one level of
255, and exactly for 8 bits a channel.

    decode_with_pillow(gif_bytes)               # a PIL image, upright: L or RGB; RGBA where a pixel is transparent
    blend_on_colour(image, (255, 255, 255))     # RGB
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from configs.data import Colour
from data.claimed_sizes import BITS_PER_SAMPLE, ORIENTATION, PHOTOMETRIC
from data.headers import exif_orientation, has_bad_png_checksum, open_header, strip_metadata
from data.image_types import SUPPORTED_TYPES, sniff

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImage(Exception):
    """Pillow cannot decode an image; the message is the reason."""


def decode_with_pillow(data: bytes) -> Image.Image:
    """Decode the first frame of an image that data.headers.refusal accepts. Raises UndecodableImage."""
    kind = sniff(data)
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
    if sniff(data) == "png" and "transparency" in image.info and image.mode in ("L", "RGB"):
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
