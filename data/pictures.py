"""An image file -> bytes a shard may hold, or the reason why not.

Bytes are kept as they are where the format is jpg, png or webp, because encoding again only loses; other
formats become PNG. Transparency is kept: the run that reads the shard sets the background (data.background). Every
image passes the check of the loader and is decoded once, so that damage is found here and not in the middle of a
training run.

    load_picture(Path("scan.tif"), max_side=None)     # (b"\\x89PNG...", "png", (2480, 3508))
    load_picture(Path("page.jpg"), max_side=None)     # Unusable: web page
"""

from __future__ import annotations

import io
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from configs.data import Pictures
from data.headers import is_animated, refusal
from data.image_types import sniff
from data.pillow_decoder import UndecodableImage, decode_with_pillow

if TYPE_CHECKING:
    from data.decode import Decoder

KEPT = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # type of data.image_types -> member extension
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MOST_PIXELS_TO_SHRINK = 178_956_970  # pixels held at a time to make a picture smaller: 0.7 GB
_MOST_PIXELS_TO_KEEP: int = Pictures.model_fields["max_pixels"].default
_decoder_lock = threading.Lock()  # the fallback decoder is shared by all threads

Picture = tuple[bytes, str, tuple[int, int]]  # file bytes, member extension, (width, height) of the upright image


class Unusable(Exception):
    """Why a file cannot become a sample: a short reason, after a colon the particulars."""


def load_picture(path: Path, max_side: int | None) -> Picture:
    """The picture in a file, made smaller where a side is longer than `max_side` pixels. Raises Unusable."""
    content = _read(path)
    if not content:
        raise Unusable("empty file")
    most = _MOST_PIXELS_TO_KEEP if max_side is None else _MOST_PIXELS_TO_SHRINK
    reason = refusal(content, most)
    if reason == "too many pixels":
        remedy = "; make it smaller with --max-side" if max_side is None else ""
        raise Unusable(f"{reason}: above the {most:,} that a run reads{remedy}")
    if reason is not None:
        raise Unusable(reason)
    return _keep_or_encode(_decode(content), content, max_side)


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for, and a device read without end
            raise Unusable("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None


def _decode(content: bytes) -> Image.Image:
    """Decode the first frame, with Pillow or else with the loader's decoder, so that both accept the same images."""
    try:
        return decode_with_pillow(content)
    except UndecodableImage as error:
        with _decoder_lock:
            [found] = _loader_decoder().decode([content])
        if isinstance(found, str):
            raise Unusable(f"{found}: {error}") from None
        return Image.fromarray(found.pixels.numpy())


@cache
def _loader_decoder() -> Decoder:
    from data.decode import Decoder  # importing torch and DALI takes seconds

    return Decoder("cpu", threads=1)


def _keep_or_encode(image: Image.Image, content: bytes, max_side: int | None) -> Picture:
    """Keep the bytes where type, size and number of frames allow, else encode `image`, their upright first frame."""
    extension = KEPT.get(sniff(content))
    is_small = max_side is None or max(image.size) <= max_side
    if extension is not None and is_small and not is_animated(content):
        return content, extension, image.size
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    extension = extension or "png"
    with io.BytesIO() as file:
        still = image.convert("RGB") if extension == "jpg" else image
        still.save(file, ENCODERS[extension], quality=95)
        return file.getvalue(), extension, still.size
