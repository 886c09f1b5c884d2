"""Encoded pictures + view numbers -> RGB crops: the one door to NVIDIA DALI.

DALI's dynamic mode runs eager operators with its own threads, on CPU or GPU: a picture it cannot decode is an
ordinary exception and the next call works (a DALI pipeline object would be dead). What it does not read or would
show wrongly (data.headers.needs_pillow: transparency, GIF, AVIF, some TIFFs), and what it fails at by itself, Pillow
decodes (data/pillow_decoder.py). Each picture is decoded
once, upright as its EXIF says, and every view is cut from it by an antialiased bilinear resize of the window.
On a GPU DALI renders the views too; on CPU data/render.py does, several times as fast as DALI's CPU operators.

    decoder = Decoder("cpu", threads=2)
    pictures = decoder.decode([jpeg_bytes, png_bytes])           # Picture, or the reason why not
    crops = decoder.render(pictures, draw("image", ...))         # (2, 3, 256, 256) uint8

Windows are cut at whole pixels. Every operator works picture by picture, so the bytes of a crop do not depend on
what else is in the batch.

On a GPU all of it is queued on a stream of the decoder's own, beside the one that trains. Whoever asks for crops gets
them ordered before what it queues next; a loader that works ahead asks inside `on_own_stream` and hands on an event:

    with decoder.on_own_stream():
        crops = decoder.render(pictures, numbers)                # queued, and nobody waits
    ready = decoder.record_event()                               # for data.to_device.wait_until
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from configs import UserError
from configs.data import WHITE, Colour
from data.headers import has_16_bit_alpha, needs_pillow
from data.pillow_decoder import UndecodableImage, blend_on_colour, decode_with_pillow
from data.render import LUMA, Renderer
from data.to_device import to_device
from data.views import ViewNumbers, whole_pixels


class _LazyModule:
    """Import a module of DALI at its first use, so that everything but decoding works where DALI is missing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_imported(self._name), attribute)


@cache
def _imported(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the packages DALI imports; nothing of ours
            return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}: images are decoded by NVIDIA DALI, which is not installed here; "
            "pip install -c constraints.txt nvidia-dali-cuda130"
        ) from None


types: Any = _LazyModule("nvidia.dali.types")
dali: Any = _LazyModule("nvidia.dali.experimental.dynamic")
_UNDECODABLE = "undecodable image"


@dataclass(frozen=True)
class Picture:
    """A decoded picture: (height, width, 3) uint8 RGB, in the decoder's own memory."""

    pixels: Any  # a tensor of torch's on CPU, of DALI's on a GPU
    height: int
    width: int
    alpha_HW1: torch.Tensor | None = None  # uint8; set where each view has its own background


class Decoder:
    """Decodes and renders on one device with `threads` CPU threads. Calls of DALI from several threads take turns.

    device: "cpu", "gpu" (JPEG decoded by the GPU, other formats by the CPU, all else on the GPU) or "auto":
    gpu when there is one. background: the colour behind transparent pictures, or "random": a colour for each view.
    Raises UserError for "gpu" without a CUDA device.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "gpu"] = "auto",
        threads: int = 2,
        background: Colour | Literal["random"] = WHITE,
    ) -> None:
        has_gpu = torch.cuda.is_available()
        if device == "gpu" and not has_gpu:
            raise UserError(
                "system.loader.device=gpu but torch sees no CUDA device: decoding on the GPU needs one; "
                "set system.loader.device=cpu or auto"
            )
        self.device = "gpu" if device != "cpu" and has_gpu else "cpu"
        # Named here, on the thread that chose the rank's GPU: other threads start on GPU 0.
        device_id = torch.cuda.current_device() if self.device == "gpu" else None
        self._device = torch.device("cuda", device_id) if device_id is not None else torch.device("cpu")
        self._stream = torch.cuda.Stream(self._device) if self.device == "gpu" else None
        self._context = dali.EvalContext(num_threads=threads, device_id=device_id, cuda_stream=self._stream)
        self._lock = threading.Lock()
        self._renderer = Renderer(threads) if self.device == "cpu" else None
        self._background = background
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")  # its threads start when needed

    def decode(self, encoded: Sequence[bytes]) -> list[Picture | str]:
        """A Picture for each item, or the reason it could not be decoded."""
        by_pillow = {
            i: self._pool.submit(self._decode_with_pillow, data) for i, data in enumerate(encoded) if needs_pillow(data)
        }
        found = self._decode_with_dali(encoded, [i for i in range(len(encoded)) if i not in by_pillow])
        failed = [i for i, item in found.items() if not isinstance(item, Picture)]
        by_pillow |= {i: self._pool.submit(self._decode_with_pillow, encoded[i], failed_dali=True) for i in failed}
        found |= {i: future.result() for i, future in by_pillow.items()}
        found |= self._decode_with_dali(encoded, [i for i, item in found.items() if item is None])
        return [found[i] or _UNDECODABLE for i in range(len(encoded))]

    def tensor(self, picture: Picture) -> torch.Tensor:
        """Return (height, width, 3) uint8 on the decoder's device, of a picture without alpha."""
        assert picture.alpha_HW1 is None
        with self.on_own_stream(), self._lock:
            pixels_HW3 = torch.from_dlpack(picture.pixels)
            if self._stream is not None:  # DALI takes its own memory back without asking who reads it
                pixels_HW3 = pixels_HW3.clone()
        return self._to_current_stream(pixels_HW3)

    def render(self, pictures: Sequence[Picture], numbers: ViewNumbers) -> torch.Tensor:
        """(n, 3, size, size) uint8 RGB: row i shows view i of `numbers` on picture i mod len(pictures).

        So with the numbers of several views one after the other, the rows come out view-major.
        """
        num_rows = len(numbers.windows)
        if not num_rows:
            return self.nothing(numbers.size)
        assert num_rows % len(pictures) == 0, f"{num_rows} views of {len(pictures)} pictures"
        shown = [pictures[i % len(pictures)] for i in range(num_rows)]
        windows = whole_pixels(numbers.windows, [p.height for p in shown], [p.width for p in shown])
        pixels = [p.pixels for p in shown]
        for row, picture in enumerate(shown):
            if picture.alpha_HW1 is not None:
                pixels[row] = self._blend_window(picture, windows[row], numbers.background[row])
                windows[row] = [0, 0, *pixels[row].shape[:2]]
        if self._renderer is not None:
            return self._renderer.render(pixels, windows, numbers)
        return self.render_with_dali(pixels, windows, numbers)

    def render_with_dali(self, pixels: Sequence[Any], windows: NDArray[np.int64], numbers: ViewNumbers) -> torch.Tensor:
        """What Renderer.render does, in DALI's operators: the way on a GPU, and on CPU the oracle of data/render.py."""
        with self._dali():
            rows = self._cut(pixels, windows, numbers.size)
            rows = _change(rows, numbers.jitter, lambda some, idx: _jitter(some, numbers, idx))
            rows = _change(rows, numbers.blur_sigma > 0, lambda some, idx: _blur(some, numbers, idx))
            crops = dali.crop_mirror_normalize(
                dali.as_batch(rows),
                dtype=types.UINT8,
                output_layout="CHW",
                mirror=_per_row(numbers.flip, np.int32),
            ).torch(copy=True)
            crops = _solarise(_grey(crops, numbers.grey), numbers.solarise)
        return self._to_current_stream(crops)

    def on_own_stream(self) -> AbstractContextManager[Any]:
        """Make the decoder's CUDA stream current inside the `with`; other streams do not wait for its work."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def record_event(self) -> torch.cuda.Event | None:
        """Return a CUDA event that fires when all crops requested so far are ready; None on the CPU, where they are."""
        return None if self._stream is None else self._stream.record_event()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
        if self._renderer is not None:
            self._renderer.close()

    def nothing(self, size: int) -> torch.Tensor:
        """(0, 3, size, size) uint8 on the device: the crops of an objective that is off."""
        return torch.empty((0, 3, size, size), dtype=torch.uint8, device=self._device)

    def _decode_with_dali(self, encoded: Sequence[bytes], idx: Sequence[int]) -> dict[int, Picture | str | None]:
        """Decode the items of these indices."""
        with self._dali():
            return dict(zip(idx, self._decode([np.frombuffer(encoded[i], np.uint8) for i in idx]), strict=True))

    def _decode_with_pillow(self, data: bytes, failed_dali: bool = False) -> Picture | str | None:
        """Decode with Pillow; None for a picture left to DALI: 16 bits a channel and no transparent pixel."""
        try:
            image = decode_with_pillow(data)
        except UndecodableImage:
            return _UNDECODABLE
        if image.mode != "RGBA":
            return None if not failed_dali and has_16_bit_alpha(data) else self._to_picture(image.convert("RGB"))
        if self._background != "random":
            return self._to_picture(blend_on_colour(image, self._background))
        with self.on_own_stream():
            alpha_HW1 = to_device(torch.from_numpy(np.array(image.getchannel("A")))[:, :, None], self._device)
        return replace(self._to_picture(image.convert("RGB")), alpha_HW1=alpha_HW1)

    def _to_picture(self, image: Image.Image) -> Picture:
        pixels: Any = np.array(image)
        if self.device == "cpu":
            pixels = torch.from_numpy(pixels)
        else:
            with self._dali():
                pixels = dali.as_tensor(pixels, device="gpu", layout="HWC")
        return Picture(pixels, image.height, image.width)

    def _decode(self, encoded: list[NDArray[np.uint8]]) -> list[Picture | str]:
        """Halves a failing batch until each bad picture is alone: k of n cost about k log n more calls."""
        if not encoded:
            return []
        try:
            batch = dali.decoders.image(dali.as_batch(encoded), device=self.device, output_type=types.RGB).evaluate()
        except RuntimeError:
            if len(encoded) == 1:
                return [_UNDECODABLE]
            half = len(encoded) // 2
            return self._decode(encoded[:half]) + self._decode(encoded[half:])
        tensors = _rows(batch)
        if self.device == "cpu":
            tensors = [torch.from_dlpack(tensor) for tensor in tensors]
        return [Picture(tensor, *tensor.shape[:2]) for tensor in tensors]

    def _blend_window(self, picture: Picture, window: NDArray[np.int64], colour: NDArray[np.uint8]) -> Any:
        """Cut a window of a picture with alpha and blend it over a colour; returns the form of Picture.pixels."""
        top, left, bottom, right = window.tolist()
        assert picture.alpha_HW1 is not None
        alpha_HW1, colour_3 = picture.alpha_HW1[top:bottom, left:right], torch.from_numpy(colour)
        if self.device == "cpu":
            return blend(picture.pixels[top:bottom, left:right], alpha_HW1, colour_3)
        with self._dali():
            pixels_HW3 = torch.from_dlpack(picture.pixels)[top:bottom, left:right]
            return dali.as_tensor(blend(pixels_HW3, alpha_HW1, to_device(colour_3, self._device)), layout="HWC")

    @contextmanager
    def _dali(self) -> Iterator[None]:
        """Hold the lock on DALI inside the `with`, and queue its work on the decoder's stream."""
        with self.on_own_stream(), self._lock, self._context, dali.EvalMode.sync_cpu:
            yield

    def _to_current_stream(self, made: torch.Tensor) -> torch.Tensor:
        """Make the current stream wait for a tensor of the decoder's stream, and return the tensor."""
        if self._stream is not None and (current := torch.cuda.current_stream(self._device)) != self._stream:
            current.wait_stream(self._stream)
            made.record_stream(current)
        return made

    def _cut(self, pixels: Sequence[Any], windows: NDArray[np.int64], size: int) -> list[Any]:
        resized = dali.resize(
            dali.as_batch(list(pixels), layout="HWC"),
            size=[size, size],
            roi_start=_per_row(windows[:, :2]),
            roi_end=_per_row(windows[:, 2:]),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return _rows(resized)


def blend(pixels_HW3: torch.Tensor, alpha_HW1: torch.Tensor, colour_3: torch.Tensor) -> torch.Tensor:
    """Blend pixels over a colour on their device, rounding to the nearest integer: bit-equal to
    data.pillow_decoder.blend_on_colour."""
    colour, alpha = colour_3.int(), alpha_HW1.int()
    return ((pixels_HW3.int() * alpha + colour * (255 - alpha) + 127) // 255).to(torch.uint8)


def _change(rows: list[Any], active: NDArray[np.bool_], operator: Callable[[Any, NDArray[np.int64]], Any]) -> list[Any]:
    """The rows with the active ones replaced by `operator(batch of them, their indices)`."""
    chosen = np.flatnonzero(active)
    if not len(chosen):
        return rows
    changed = dict(zip(chosen.tolist(), _rows(operator(dali.as_batch([rows[i] for i in chosen]), chosen)), strict=True))
    return [changed.get(i, row) for i, row in enumerate(rows)]


def _jitter(rows: Any, numbers: ViewNumbers, idx: NDArray[np.int64]) -> Any:
    """Hue, saturation, contrast, brightness, in the order DALI fixes; contrast is about mid-grey."""
    return dali.color_twist(
        rows,
        brightness=_per_row(numbers.brightness[idx]),
        contrast=_per_row(numbers.contrast[idx]),
        saturation=_per_row(numbers.saturation[idx]),
        hue=_per_row(numbers.hue[idx]),
    )


def _blur(rows: Any, numbers: ViewNumbers, idx: NDArray[np.int64]) -> Any:
    return dali.gaussian_blur(rows, sigma=_per_row(numbers.blur_sigma[idx]))


def _grey(crops: torch.Tensor, active: NDArray[np.bool_]) -> torch.Tensor:
    """Luminance in whole numbers, so that the three channels are equal and no device rounds otherwise."""
    rows = to_device(torch.from_numpy(np.flatnonzero(active)), crops.device)
    red, green, blue = crops[rows].int().unbind(1)
    luma = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 500) // 1000
    crops[rows] = luma.to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return crops


def _solarise(crops: torch.Tensor, active: NDArray[np.bool_]) -> torch.Tensor:
    rows = to_device(torch.from_numpy(np.flatnonzero(active)), crops.device)
    some = crops[rows]
    crops[rows] = torch.where(some >= 128, 255 - some, some)
    return crops


def _rows(batch: Any) -> list[Any]:
    return [batch.tensors[i] for i in range(batch.batch_size)]


def _per_row(values: NDArray[Any], dtype: Any = np.float32) -> Any:
    """An argument with one value (or one vector) for each row."""
    return dali.as_batch(np.ascontiguousarray(values, dtype))
