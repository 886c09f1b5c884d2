"""Samples to write into a corpus: encoded from drawings or loaded from image files; and the plan of a corpus.

    CorpusSample(b"\\xff\\xd8...", "jpg", "a red heart", {"label": 32}).members()
    # {"jpg": b"\\xff\\xd8...", "txt": b"a red heart", "json": b'{"label": 32}'}

    encode_image(image, random.Random("0/train/7/format"))          # (b"\\xff\\xd8...", "jpg")
    render = functools.partial(render_synthetic_sample, 0, "train", 64)  # index -> CorpusSample; can be pickled
    next(render_in_order(render, count=6000, pixels=64 * 64, workers=2)).caption

    load_image(Path("scan.tif"), max_side=None)     # (b"\\x89PNG...", "png", (2480, 3508))
    load_image(Path("page.jpg"), max_side=None)     # UnusableImage: web page

Drawn samples are encoded in the mix of formats that the web has, by as many processes as there are cores. A sample is a
function of its index alone, so a corpus is the same bytes whatever the number of processes.

Bytes of image files are kept where the format is jpg, png or webp, because encoding again only loses; other formats
become PNG. Transparency is kept: the run that reads the shard sets the background (data.background). Every image passes
the check of the loader and is decoded once, so that damage is found here and not in the middle of a training run.
"""

from __future__ import annotations

import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from configs.data import ImageData
from data.image_headers import detect_type
from data.pillow_decoder import UndecodableImage, decode_with_pillow, image_fault, is_animated
from data.processes import map_in_order

# Frequencies as on the web, so that every decoder is used: (extension, Pillow format, weight, options).
FORMATS: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("jpg", "JPEG", 8, {"quality": 92, "subsampling": 0}),
    ("png", "PNG", 1, {}),
    ("webp", "WEBP", 1, {"quality": 92, "method": 2}),
)
MIN_POOL_PIXELS = 2_000_000  # pixels; below it, starting processes takes longer than drawing
KEPT_TYPES = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # type of data.image_headers -> member extension
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_PIXELS_TO_SHRINK = 178_956_970  # of an image to be made smaller: 0.7 GB
_MAX_PIXELS_TO_KEEP: int = ImageData.model_fields["max_pixels"].default
_decoder_lock = threading.Lock()  # the fallback decoder is shared by all threads
ImageFile = tuple[bytes, str, tuple[int, int]]  # file bytes, member extension, (width, height) of the upright image


@dataclass(frozen=True)
class CorpusSample:
    """One sample: `image` is a whole file of the format `extension`, jpg, png or webp; `attributes` are JSON."""

    image: bytes
    extension: str
    caption: str
    attributes: dict[str, Any]

    def members(self) -> dict[str, bytes]:
        """Return member extension -> bytes, in the layout of webdataset and img2dataset."""
        attributes = json.dumps(self.attributes, ensure_ascii=False, sort_keys=True)
        return {
            self.extension: self.image,
            "txt": self.caption.encode("utf-8", "replace"),
            "json": attributes.encode("utf-8", "replace"),
        }


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus to be written. Equal `arguments` mean equal content."""

    arguments: dict[str, Any]
    splits: dict[str, Iterator[CorpusSample]]  # "train" and "held_out"; each is read once
    counts: dict[str, int]  # most samples that each split may have, for the progress shown
    shard_size: int
    vocab: int | None  # size of the tokenizer to train on the train captions; None: none
    files: Callable[[], dict[str, Any]]  # file name -> text or JSON content; called after all samples were read


def encode_image(image: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    """Encode an image in a format that `rng` chooses; return the file's bytes and its extension."""
    extension, name, _, options = rng.choices(FORMATS, weights=[weight for _, _, weight, _ in FORMATS])[0]
    with io.BytesIO() as file:
        image.save(file, name, **options)
        return file.getvalue(), extension


def render_in_order(
    render: Callable[[int], CorpusSample], count: int, pixels: int, workers: int
) -> Iterator[CorpusSample]:
    """Render samples 0 .. count-1 of `pixels` pixels each, in order, by `workers` processes."""
    return map_in_order(render, range(count), workers if count * pixels >= MIN_POOL_PIXELS else 1, chunk=32)


if TYPE_CHECKING:
    from data.decode import Decoder


class UnusableImage(Exception):
    """A file cannot become a sample: a short reason, after a colon the details."""


def load_image(path: Path, max_side: int | None) -> ImageFile:
    """Load the image of a file, made smaller where a side exceeds `max_side` pixels. Raises UnusableImage."""
    content = _read_bytes(path)
    if not content:
        raise UnusableImage("empty file")
    max_pixels = _MAX_PIXELS_TO_KEEP if max_side is None else _MAX_PIXELS_TO_SHRINK
    reason = image_fault(content, max_pixels)
    if reason == "too many pixels":
        remedy = "; make it smaller with --max-side" if max_side is None else ""
        raise UnusableImage(f"{reason}: above the {max_pixels:,} that a run reads{remedy}")
    if reason is not None:
        raise UnusableImage(reason)
    return _keep_or_encode(_decode(content), content, max_side)


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would block, and a device be read without end
            raise UnusableImage("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UnusableImage(f"cannot be read: {error.strerror}") from None


def _decode(content: bytes) -> Image.Image:
    """Decode the first frame, with Pillow or else with the loader's decoder, so that both accept the same images."""
    try:
        return decode_with_pillow(content)
    except UndecodableImage as error:
        with _decoder_lock:
            [result] = _loader_decoder().decode([content])
        if isinstance(result, str):
            raise UnusableImage(f"{result}: {error}") from None
        return Image.fromarray(result.pixels.numpy())


@cache
def _loader_decoder() -> Decoder:
    from data.decode import Decoder  # importing torch and DALI takes seconds

    return Decoder("cpu", threads=1)


def _keep_or_encode(image: Image.Image, content: bytes, max_side: int | None) -> ImageFile:
    """Keep the bytes where type, size and number of frames allow, else encode `image`, their upright first frame."""
    extension = KEPT_TYPES.get(detect_type(content))
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
