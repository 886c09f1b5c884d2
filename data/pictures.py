"""An image file -> bytes a shard may hold, or the reason why not.

Bytes are kept as they are where the format is jpg, png or webp, because encoding again only loses; other
formats become PNG. Every image is decoded once, so that damage shows here and not in the middle of a
training run.

    load_picture(Path("scan.tif"), max_side=None)     # (b"\\x89PNG...", "png", (2480, 3508))
    load_picture(Path("page.jpg"), max_side=None)     # Unusable: not an image
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member extension
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

Picture = tuple[bytes, str, tuple[int, int]]  # file bytes, member extension, (width, height)


class Unusable(Exception):
    """Why a file cannot become a sample: a short reason, after a colon the particulars."""


def load_picture(path: Path, max_side: int | None) -> Picture:
    """The picture in a file, made smaller where a side is longer than `max_side` pixels. Raises Unusable."""
    try:
        content = _read(path)
        if not content:
            raise Unusable("empty file")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _keep_or_encode(image, content, max_side)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except Image.DecompressionBombError:
        raise Unusable("too many pixels") from None
    except Exception as error:  # damage makes Pillow's parsers raise almost anything
        raise Unusable(f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for, and a device read without end
            raise Unusable("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None


def _keep_or_encode(image: Image.Image, content: bytes, max_side: int | None) -> Picture:
    extension = KEPT.get(image.format or "", "png")
    is_moving = getattr(image, "is_animated", False) and image.format != "MPO"
    if image.format in KEPT and not is_moving and (max_side is None or max(image.size) <= max_side):
        return content, extension, image.size
    still = _eight_bits(ImageOps.exif_transpose(image))  # the first frame, upright
    if max_side is not None:
        still.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if extension == "jpg":
        still = still.convert("RGB")
    with io.BytesIO() as file:
        still.save(file, ENCODERS[extension], quality=95)
        return file.getvalue(), extension, still.size


def _eight_bits(image: Image.Image) -> Image.Image:
    """A copy in grey, RGB or RGBA of 8 bits."""
    if image.mode == "F":
        raise Unusable("floating-point pixels: which value is white is not known")
    if image.mode.startswith("I"):  # 16-bit grey: a plain conversion to L cuts the bright values off
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("L", "RGB", "RGBA"):
        return image.copy()
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
