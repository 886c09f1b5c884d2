"""Views: random crops, flips and colour changes, drawn from hashes; and their rendering on CPU threads.

    params = draw_view("global1", config.views, seed, key_hashes, epochs, heights, widths)
    params.windows[i]     # [top, left, bottom, right] of image i in pixels, fractions allowed

    renderer = Renderer(threads=2)
    renderer.render([image_HW3, ...], windows, params)      # (n, 3, size, size) uint8

A draw is a pure function of (seed, sample key, epoch, view), so pixels do not depend on the batch, the rank,
the world size or the device. Views are named image, global0, global1, local0 ... local(N-1).

Why plain PyTorch and not DALI's CPU operators, which render the same (data/decode.py keeps them for the GPU and as the
oracle): DALI's resize takes ten times as long as torch's vectorised uint8 one, colours and blur three to five times.

A crop's bytes depend on nothing but its image and parameters: the colours are single multiplications and
additions, each rounded as IEEE says, in an order that neither the batch nor the number of threads changes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

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
LUMA = (299, 587, 114)  # thousandths of R, G, B (ITU-R BT.601)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])  # of RGB, as DALI has it
_CHUNK = 1 << 17  # values of a task: half a megabyte of floats stays in a core's cache


@dataclass(frozen=True)
class ViewParams:
    """The parameters of one view of n images.

    Applied in this order: background, crop, flip, jitter, blur, grey, solarise.
    """

    size: int  # pixels of the square crop
    windows: Floats  # (n, 4) top, left, bottom, right in pixels of the upright image
    flip: Flags  # (n,) mirrored left to right
    jitter: Flags  # (n,) whether the next four apply; contrast is about mid-grey
    brightness: Floats  # (n,) factor
    contrast: Floats  # (n,) factor
    saturation: Floats  # (n,) factor
    hue: Floats  # (n,) degrees
    grey: Flags  # (n,)
    blur_sigma: Floats  # (n,) pixels of the crop, 0 is no blur
    solarise: Flags  # (n,) values from 128 up are inverted
    background: NDArray[np.uint8]  # (n, 3) RGB blended behind a transparent image, with data.background=random


def view_names(config: Views) -> list[str]:
    """Return the names of the ssl views in the order of the crops: two global, then the local ones."""
    return ["global0", "global1", *(f"local{i}" for i in range(config.num_locals))]


def draw_view(
    view: str,
    config: Views,
    seed: int,
    keys: ArrayLike,
    epochs: ArrayLike,
    heights: ArrayLike,
    widths: ArrayLike,
) -> ViewParams:
    """Draw the parameters of one view for n images: `keys` are 64-bit key hashes, sizes are in pixels, all (n,)."""
    base = hash_words(seed, hash_text(view), np.asarray(keys, np.uint64), epochs)

    def number(slot: int) -> Floats:
        return uniform(hash_words(base, slot))

    def factor(slot: int, strength: float) -> Floats:
        return np.maximum(0.0, 1.0 + strength * (2.0 * number(slot) - 1.0))

    size, scale, blur = _view_spec(view, config)
    is_ssl = view != "image"
    low, high = config.blur_sigma
    return ViewParams(
        size=size,
        windows=random_windows(base, scale, heights, widths),
        flip=(number(_FLIP) < config.flip) & is_ssl,  # captions name left and right: the clip view is never flipped
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
    """Draw (n, 4) windows of a fraction `scale` of the area and aspect 3/4 .. 4/3 (log-uniform), uniformly placed.

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


def round_windows(windows: Floats, heights: ArrayLike, widths: ArrayLike) -> NDArray[np.int64]:
    """Round (n, 4) windows to the nearest pixels, inside images of these sides; at least one pixel remains.

    [[10.4, 0.0, 10.45, 7.6]] of a 20 x 8 image -> [[10, 0, 11, 8]]
    """
    edges = np.rint(windows).astype(np.int64)
    last = np.stack([heights, widths], axis=1).astype(np.int64) - 1
    start = np.minimum(edges[:, :2], last)
    return np.concatenate([start, np.maximum(edges[:, 2:], start + 1)], axis=1)


def concatenate_views(parts: list[ViewParams]) -> ViewParams:
    """Concatenate views of one size: view-major rows."""
    size = parts[0].size
    assert all(part.size == size for part in parts)
    fields = [name for name in ViewParams.__dataclass_fields__ if name != "size"]
    return ViewParams(size, *(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _view_spec(view: str, config: Views) -> tuple[int, Range, float]:
    """Return (crop size, scale, probability of blur) of a view."""
    if view == "image":
        return config.image_size, config.image_scale, 0.0
    if view.startswith("global"):
        return config.global_size, config.global_scale, config.blur[int(view.removeprefix("global"))]
    return config.local_size, config.local_scale, config.blur[2]


class Renderer:
    """Cuts and colours crops with `threads` threads, each of which runs its torch operators alone."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="render", initializer=_use_one_torch_thread)
        all_started, before = threading.Barrier(threads), torch.get_num_threads()
        list(self._pool.map(lambda _: all_started.wait(), range(threads)))
        torch.set_num_threads(before)  # what one thread sets is also the default of later threads

    def render(self, pixels: Sequence[Tensor], windows: NDArray[np.int64], params: ViewParams) -> Tensor:
        """Return (n, 3, size, size) uint8 RGB crops: row i is window i of `pixels[i]`, flipped and coloured.

        pixels: n tensors (height, width, 3) uint8; windows: (n, 4) top, left, bottom, right in whole pixels.
        """
        crops = torch.empty((len(pixels), 3, params.size, params.size), dtype=torch.uint8)
        rows = np.argsort(params.blur_sigma, kind="stable")  # rows of a chunk have similar blur reach
        chunk = max(1, _CHUNK // crops[:1].numel())

        def render_chunk(start: int) -> None:
            chosen = rows[start : start + chunk]
            for row in chosen:
                _cut(pixels[row], windows[row], bool(params.flip[row]), crops[row])
            _colour(crops, params, chosen)

        list(self._pool.map(render_chunk, range(0, len(rows), chunk)))
        return crops

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch sets its number of threads: after that ours stays
    torch.set_num_threads(1)


def _cut(pixels_HW3: Tensor, window: NDArray[np.int64], is_flipped: bool, crop: Tensor) -> None:
    top, left, bottom, right = window.tolist()
    part = pixels_HW3[top:bottom, left:right].permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = interpolate(part, size=crop.shape[1:], mode="bilinear", antialias=True)
    crop.copy_((resized.flip(-1) if is_flipped else resized)[0])


def _colour(crops: Tensor, params: ViewParams, rows: NDArray[np.int64]) -> None:
    """Apply jitter, blur, grey and solarisation to some rows, in place; intermediate values are not rounded."""
    blur, jitter = params.blur_sigma > 0, params.jitter
    rows = rows[(blur | jitter | params.grey | params.solarise)[rows]]
    if not len(rows):
        return
    x = crops[torch.from_numpy(rows)].float()
    if jitter[rows].any():
        x = _jitter(x, params, rows)
    if blur[rows].any():
        weights = torch.from_numpy(gaussian_weights(params.blur_sigma[rows], params.size - 1)).float()
        x = _smooth(_smooth(x, weights, dim=2), weights, dim=3)
    x.round_()
    for row in np.flatnonzero(params.grey[rows]):
        red, green, blue = (weight * channel for weight, channel in zip(LUMA, x[row], strict=True))
        x[row] = ((red + green + blue + 500) / 1000).floor_()
    for row in np.flatnonzero(params.solarise[rows]):
        x[row] = torch.where(x[row] >= 128, 255 - x[row], x[row])
    crops.numpy()[rows] = x.numpy().astype(np.uint8)  # torch's own conversion takes six times as long


def _jitter(x: Tensor, params: ViewParams, rows: NDArray[np.int64]) -> Tensor:
    """Apply hue, saturation, contrast and brightness to x (m, 3, s, s): one 3 x 3 matrix and one offset a row."""
    matrices, offsets = colour_matrices(params, rows)
    matrix, offset = (torch.from_numpy(part).float()[..., None, None] for part in (matrices, offsets))
    mixed = x[:, :1] * matrix[:, :, 0]
    term = torch.empty_like(mixed)
    for channel in (1, 2):
        torch.mul(x[:, channel : channel + 1], matrix[:, :, channel], out=term)
        mixed += term
    mixed += offset
    return mixed.clamp_(0, 255)


def colour_matrices(params: ViewParams, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return ((m, 3, 3), (m, 3)): the colour of a pixel becomes matrix @ RGB + offset; identity without jitter.

    Hue rotates and saturation scales the chroma plane of YIQ; contrast is about mid-grey 128, brightness a factor.
    """
    angle, saturation = np.radians(params.hue[rows]), params.saturation[rows]
    chroma = np.zeros((len(rows), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 1, 2], chroma[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    contrast, brightness = params.contrast[rows], params.brightness[rows]
    matrices = (brightness * contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ chroma @ _YIQ)
    offsets = np.repeat((brightness * (128 - 128 * contrast))[:, None], 3, axis=1)
    active = params.jitter[rows]
    return np.where(active[:, None, None], matrices, np.eye(3)), np.where(active[:, None], offsets, 0.0)


def gaussian_weights(sigmas: Floats, longest: int) -> Floats:
    """Return (m, 1 + reach) blur weights at distance 0, 1 ... of each sigma in pixels; sigma 0 has all at distance 0.

    Cut off at 3 sigma as DALI does, and at `longest`: a crop is mirrored at its border only once.
    """
    reach = np.minimum(np.ceil(3 * sigmas), longest)
    distance = np.arange(int(reach.max()) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(-0.5 * (distance / sigmas[:, None]) ** 2)
    weights = np.where(distance <= reach[:, None], weights, 0.0)
    weights[:, 0] = 1.0
    return weights / (2 * weights.sum(1, keepdims=True) - 1)


def _smooth(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Convolve x (m, 3, s, s) with symmetric weights along one axis, mirrored at the borders (reflect 101)."""
    reach, size = weights.shape[1] - 1, x.shape[dim]
    wide = pad(x, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode="reflect")
    weight = weights.T[..., None, None, None]
    out = x * weight[0]
    pair = torch.empty_like(x)
    for distance in range(1, reach + 1):
        torch.add(wide.narrow(dim, reach - distance, size), wide.narrow(dim, reach + distance, size), out=pair)
        pair *= weight[distance]
        out += pair
    return out
