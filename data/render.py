"""Decoded pictures + view numbers -> RGB crops on CPU threads, in plain PyTorch.

Why not DALI's CPU operators, which render the same (data/decode.py keeps them for the GPU and as the oracle):
its resize takes ten times as long as torch's vectorised uint8 one, colours and blur three to five times.

    renderer = Renderer(threads=2)
    renderer.render([picture_HW3, ...], windows, numbers)      # (n, 3, size, size) uint8

A crop's bytes depend on nothing but its picture and numbers: the colours are single multiplications and
additions, each rounded as IEEE says, in an order that neither the batch nor the number of threads changes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from data.views import ViewNumbers

Floats = NDArray[np.float64]
LUMA = (299, 587, 114)  # thousandths of R, G, B (ITU-R BT.601)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])  # of RGB, as DALI has it
_CHUNK = 1 << 17  # values a task holds at a time: half a megabyte of floats stays in a core's cache


class Renderer:
    """Cuts and colours crops with `threads` threads, each of which runs its torch operators alone."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="render", initializer=_alone)
        all_started, before = threading.Barrier(threads), torch.get_num_threads()
        list(self._pool.map(lambda _: all_started.wait(), range(threads)))
        torch.set_num_threads(before)  # what a thread sets for itself is also what later threads start with

    def render(self, pixels: Sequence[Tensor], windows: NDArray[np.int64], numbers: ViewNumbers) -> Tensor:
        """(n, 3, size, size) uint8 RGB: row i shows window i (top, left, bottom, right; whole pixels) of `pixels[i]`.

        pixels: n tensors (height, width, 3) uint8.
        """
        crops = torch.empty((len(pixels), 3, numbers.size, numbers.size), dtype=torch.uint8)
        rows = np.argsort(numbers.blur_sigma, kind="stable")  # rows of a chunk are blurred with like reach
        chunk = max(1, _CHUNK // crops[:1].numel())

        def render_chunk(start: int) -> None:
            chosen = rows[start : start + chunk]
            for row in chosen:
                _cut(pixels[row], windows[row], bool(numbers.flip[row]), crops[row])
            _colour(crops, numbers, chosen)

        list(self._pool.map(render_chunk, range(0, len(rows), chunk)))
        return crops

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def _alone() -> None:
    torch.get_num_threads()  # a thread's first use of torch sets its number: after that ours stays
    torch.set_num_threads(1)


def _cut(pixels_HW3: Tensor, window: NDArray[np.int64], is_flipped: bool, crop: Tensor) -> None:
    top, left, bottom, right = window.tolist()
    part = pixels_HW3[top:bottom, left:right].permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = interpolate(part, size=crop.shape[1:], mode="bilinear", antialias=True)
    crop.copy_((resized.flip(-1) if is_flipped else resized)[0])


def _colour(crops: Tensor, numbers: ViewNumbers, rows: NDArray[np.int64]) -> None:
    """Jitter, blur, grey and solarisation of some rows, in place; intermediate values are not rounded."""
    blur, jitter = numbers.blur_sigma > 0, numbers.jitter
    rows = rows[(blur | jitter | numbers.grey | numbers.solarise)[rows]]
    if not len(rows):
        return
    x = crops[torch.from_numpy(rows)].float()
    if jitter[rows].any():
        x = _twist(x, numbers, rows)
    if blur[rows].any():
        weights = torch.from_numpy(gaussian(numbers.blur_sigma[rows], numbers.size - 1)).float()
        x = _smooth(_smooth(x, weights, dim=2), weights, dim=3)
    x.round_()
    for row in np.flatnonzero(numbers.grey[rows]):
        red, green, blue = (weight * channel for weight, channel in zip(LUMA, x[row], strict=True))
        x[row] = ((red + green + blue + 500) / 1000).floor_()
    for row in np.flatnonzero(numbers.solarise[rows]):
        x[row] = torch.where(x[row] >= 128, 255 - x[row], x[row])
    crops.numpy()[rows] = x.numpy().astype(np.uint8)  # torch's own conversion takes six times as long


def _twist(x: Tensor, numbers: ViewNumbers, rows: NDArray[np.int64]) -> Tensor:
    """Hue, saturation, contrast and brightness as one 3 x 3 matrix and an offset for each row of x (m, 3, s, s)."""
    matrices, offsets = twists(numbers, rows)
    matrix, offset = (torch.from_numpy(part).float()[..., None, None] for part in (matrices, offsets))
    mixed = x[:, :1] * matrix[:, :, 0]
    term = torch.empty_like(mixed)
    for channel in (1, 2):
        torch.mul(x[:, channel : channel + 1], matrix[:, :, channel], out=term)
        mixed += term
    mixed += offset
    return mixed.clamp_(0, 255)


def twists(numbers: ViewNumbers, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """((m, 3, 3), (m, 3)): the colour of a pixel becomes matrix @ RGB + offset; identity without jitter.

    Hue turns and saturation stretches the chroma plane of YIQ; contrast is about mid-grey 128, brightness a factor.
    """
    angle, saturation = np.radians(numbers.hue[rows]), numbers.saturation[rows]
    chroma = np.zeros((len(rows), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 1, 2], chroma[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    contrast, brightness = numbers.contrast[rows], numbers.brightness[rows]
    matrices = (brightness * contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ chroma @ _YIQ)
    offsets = np.repeat((brightness * (128 - 128 * contrast))[:, None], 3, axis=1)
    active = numbers.jitter[rows]
    return np.where(active[:, None, None], matrices, np.eye(3)), np.where(active[:, None], offsets, 0.0)


def gaussian(sigmas: Floats, longest: int) -> Floats:
    """(m, 1 + reach): the weights at distance 0, 1 ... of each sigma in pixels; sigma 0 leaves all at distance 0.

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
    """x (m, 3, s, s) weighed with its neighbours along one axis, mirrored at the borders (reflect 101)."""
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
