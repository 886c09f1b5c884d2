"""Which window of a picture a view shows and how its colours change: numbers on the host, drawn from hashes.

A draw is a pure function of (seed, sample key, epoch, view), so pixels do not depend on the batch, the rank,
the world size or the device. Views are named image, global0, global1, local0 ... local(N-1).

    numbers = draw("global1", config.views, seed, key_hashes, epochs, heights, widths)
    numbers.windows[i]     # [top, left, bottom, right] of picture i in pixels, fractions allowed
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.data import Views
from configs.section import Range
from data.hashing import hash_text, hash_words, uniform

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
_ASPECT = (3 / 4, 4 / 3)  # of a crop, width over height [D of DINOv2, OpenCLIP]
_TRIES = 10  # windows drawn before falling back to the centre
_WINDOW_DRAWS = 2 * _TRIES + 2
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARISE, *_BACKGROUND = range(
    _WINDOW_DRAWS, _WINDOW_DRAWS + 13
)


@dataclass(frozen=True)
class ViewNumbers:
    """One view of n pictures. Applied in this order: background, crop, flip, jitter, blur, grey, solarise."""

    size: int  # pixels of the square crop
    windows: Floats  # (n, 4) top, left, bottom, right in pixels of the upright picture
    flip: Flags  # (n,) mirrored left to right
    jitter: Flags  # (n,) whether the next four apply; contrast is about mid-grey
    brightness: Floats  # (n,) factor
    contrast: Floats  # (n,) factor
    saturation: Floats  # (n,) factor
    hue: Floats  # (n,) degrees
    grey: Flags  # (n,)
    blur_sigma: Floats  # (n,) pixels of the crop, 0 is no blur
    solarise: Flags  # (n,) values from 128 up are inverted
    background: NDArray[np.uint8]  # (n, 3) RGB blended behind a transparent picture, with data.background=random


def names(config: Views) -> list[str]:
    """The ssl views of a picture, in the order of the crops: two global, then the local ones."""
    return ["global0", "global1", *(f"local{i}" for i in range(config.num_locals))]


def draw(
    view: str,
    config: Views,
    seed: int,
    keys: ArrayLike,
    epochs: ArrayLike,
    heights: ArrayLike,
    widths: ArrayLike,
) -> ViewNumbers:
    """The numbers of one view for n pictures: `keys` are 64-bit key hashes, sizes are in pixels, all (n,)."""
    base = hash_words(seed, hash_text(view), np.asarray(keys, np.uint64), epochs)

    def number(slot: int) -> Floats:
        return uniform(hash_words(base, slot))

    def factor(slot: int, strength: float) -> Floats:
        return np.maximum(0.0, 1.0 + strength * (2.0 * number(slot) - 1.0))

    size, scale, blur = _spec(view, config)
    is_ssl = view != "image"
    low, high = config.blur_sigma
    return ViewNumbers(
        size=size,
        windows=random_windows(base, scale, heights, widths),
        flip=(number(_FLIP) < config.flip) & is_ssl,  # captions speak of left and right: the clip view is never flipped
        jitter=(number(_JITTER) < config.jitter) & is_ssl,
        brightness=factor(_BRIGHTNESS, config.brightness),
        contrast=factor(_CONTRAST, config.contrast),
        saturation=factor(_SATURATION, config.saturation),
        hue=360.0 * config.hue * (2.0 * number(_HUE) - 1.0),
        grey=(number(_GREY) < config.grey) & is_ssl,
        blur_sigma=np.where(number(_BLUR) < blur, low + (high - low) * number(_SIGMA), 0.0),
        solarise=(number(_SOLARISE) < config.solarise) & (view == "global1"),
        background=np.stack([256 * number(slot) for slot in _BACKGROUND], axis=1).astype(np.uint8),
    )


def random_windows(base: NDArray[np.uint64], scale: Range, heights: ArrayLike, widths: ArrayLike) -> Floats:
    """(n, 4) windows of a share `scale` of the area and aspect 3/4 .. 4/3 (log-uniform), uniformly placed.

    Ten draws, the first that fits; where none does, the largest centred window of an allowed aspect.
    """
    height, width = (np.asarray(side, np.float64)[:, None] for side in (heights, widths))
    draws = uniform(hash_words(base[:, None], np.arange(_WINDOW_DRAWS)[None, :]))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    low, high = np.log(_ASPECT)
    aspect = np.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    tall, wide = np.sqrt(area / aspect), np.sqrt(area * aspect)
    fits = (tall <= height) & (wide <= width)
    first, rows = fits.argmax(1), np.arange(len(base))
    some = fits.any(1)
    centre = np.clip(width / height, *_ASPECT)
    tall = np.where(some, tall[rows, first], np.minimum(height, width / centre)[:, 0])
    wide = np.where(some, wide[rows, first], np.minimum(width, height * centre)[:, 0])
    shift = np.where(some[:, None], draws[:, 2 * _TRIES :], 0.5)
    top, left = shift[:, 0] * (height[:, 0] - tall), shift[:, 1] * (width[:, 0] - wide)
    return np.stack([top, left, top + tall, left + wide], axis=1)


def whole_pixels(windows: Floats, heights: ArrayLike, widths: ArrayLike) -> NDArray[np.int64]:
    """(n, 4) windows with edges at the nearest pixels, inside pictures of these sides; at least one pixel remains.

    [[10.4, 0.0, 10.45, 7.6]] of a 20 x 8 picture -> [[10, 0, 11, 8]]
    """
    edges = np.rint(windows).astype(np.int64)
    last = np.stack([heights, widths], axis=1).astype(np.int64) - 1
    start = np.minimum(edges[:, :2], last)
    return np.concatenate([start, np.maximum(edges[:, 2:], start + 1)], axis=1)


def concatenate(parts: list[ViewNumbers]) -> ViewNumbers:
    """Views of one size, one after the other: view-major rows."""
    size = parts[0].size
    assert all(part.size == size for part in parts)
    fields = [name for name in ViewNumbers.__dataclass_fields__ if name != "size"]
    return ViewNumbers(size, *(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _spec(view: str, config: Views) -> tuple[int, Range, float]:
    """(crop size, scale, probability of blur)."""
    if view == "image":
        return config.image_size, config.image_scale, 0.0
    if view.startswith("global"):
        return config.global_size, config.global_scale, config.blur[int(view.removeprefix("global"))]
    return config.local_size, config.local_scale, config.blur[2]
