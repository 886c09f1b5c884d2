"""What programs draw, as samples: encoded in the mix of formats the web has, by as many processes as there are cores.

A sample is a function of its index alone, so a corpus is the same bytes whatever the number of processes.

    render = functools.partial(render_sample, 0, "train", 64)         # index -> Sample, and processes can copy it
    next(in_order(render, count=6000, pixels=64 * 64, workers=2)).caption
    encoded(picture, random.Random("0/train/7/format"))               # (b"\\xff\\xd8...", "jpg")
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator

from PIL import Image

from data.processes import map_in_order
from data.sample import Sample

# Shares as on the web, so that every decoder is used: (extension, Pillow format, weight, options).
FORMATS: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("jpg", "JPEG", 8, {"quality": 92, "subsampling": 0}),
    ("png", "PNG", 1, {}),
    ("webp", "WEBP", 1, {"quality": 92, "method": 2}),
)
WORTH_A_POOL = 2_000_000  # pixels; below it, starting processes takes longer than drawing


def encoded(picture: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    """The picture as the bytes of an image file, and the extension of its format, which `rng` chooses."""
    extension, name, _, options = rng.choices(FORMATS, weights=[weight for _, _, weight, _ in FORMATS])[0]
    with io.BytesIO() as file:
        picture.save(file, name, **options)
        return file.getvalue(), extension


def in_order(render: Callable[[int], Sample], count: int, pixels: int, workers: int) -> Iterator[Sample]:
    """Samples 0 .. count-1 of `pixels` pixels each, in order, rendered by `workers` processes."""
    return map_in_order(render, range(count), workers if count * pixels >= WORTH_A_POOL else 1, chunk=32)
