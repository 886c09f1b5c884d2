"""Pillow's decoding, for what DALI does not read or shows wrongly, and for the folder converter.

Alpha is kept: whoever shows the picture chooses what shows through. Values are those DALI gives, where it gives the
right ones, to one level of 255; of 8-bit pictures the same.

    decoded(gif_bytes)                          # a PIL image, upright: L or RGB; RGBA where a pixel is transparent
    on_colour(image, (255, 255, 255))           # RGB
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from configs.data import Colour
from data.claimed_sizes import BITS, ORIENTATION, PHOTOMETRIC
from data.headers import has_damaged_chunk, opened, orientation, without_metadata
from data.picture_types import READ_TYPES, sniff

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(Exception):
    """Why Pillow cannot decode a picture."""


def decoded(data: bytes) -> Image.Image:
    """The first frame of a picture that data.headers.refusal let pass. Raises Undecodable."""
    kind = sniff(data)
    if kind not in READ_TYPES:
        raise Undecodable(kind)
    if kind == "png" and has_damaged_chunk(data):
        raise Undecodable("a checksum does not hold")
    try:
        image = opened(kind, without_metadata(kind, data))
        image.load()
        turn = _TURNS.get(_orientation(kind, data, image))
        upright = _eight_bits(image, data)
        return upright if turn is None else upright.transpose(turn)
    except Exception as error:  # damage makes Pillow's parsers raise almost anything
        raise Undecodable((str(error) or type(error).__name__).splitlines()[0]) from None


def on_colour(image: Image.Image, colour: Colour) -> Image.Image:
    """RGB, a transparent picture blended with a colour behind it."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, colour)
    ground.paste(image, mask=image)
    return ground


def _orientation(kind: str, data: bytes, image: Image.Image) -> int:
    """Pillow turns TIFFs by itself, and puts an AVIF's own turn into its EXIF."""
    if kind == "avif":
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION, 1))
    return orientation(kind, data)


def _eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """L, RGB or, where a pixel is transparent, RGBA; 8 bits a channel."""
    if image.mode.startswith("I;16"):
        return _from_sixteen_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
    if sniff(data) == "png" and "transparency" in image.info and image.mode in ("L", "RGB"):
        image.info["transparency"] = _scaled(image.info["transparency"], data[24])
    rgba = image.convert("RGBA")
    return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba


def _scaled(key: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour in the 8 bits that Pillow makes of its samples: it leaves the colour in the file's."""
    if isinstance(key, tuple):
        return tuple(value >> max(bits - 8, 0) for value in key)
    return key * 255 // (2**bits - 1) if bits < 8 else key


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits, rounded as DALI does; a plain conversion cuts the bright values off."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.uint32)
    top = 4095 if tags.get(BITS) == (12,) else 65535
    grey = np.minimum((values * 255 + top // 2) // top, 255).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    if alpha.all():
        return Image.fromarray(grey)
    return Image.merge("RGBA", [*[Image.fromarray(grey)] * 3, Image.fromarray(alpha)])
