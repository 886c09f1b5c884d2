"""Decode images and render views as RGB crops: the one door to NVIDIA DALI.

    decoder = Decoder("cpu", threads=2)
    images = decoder.decode([jpeg_bytes, png_bytes])             # a DecodedImage each, or the reason why not
    crops = decoder.render(images, draw_view("image", ...))      # (2, 3, 256, 256) uint8

DALI's dynamic mode runs eager operators with its own threads, on CPU or GPU: an image it cannot decode is an ordinary
exception and the next call works (a DALI pipeline object would be dead). What it does not read or would show wrongly
(data.pillow_decoder.needs_pillow: transparency, GIF, AVIF, some TIFFs), and what it fails at in a batch of its own,
Pillow decodes (data/pillow_decoder.py). Each image is decoded once, upright as its EXIF says, and every view is cut
from it by an antialiased bilinear resize of the window. On a GPU DALI renders the views too; on CPU data/augment.py
does, several times as fast as DALI's CPU operators.

Windows are cut at whole pixels. Every operator works image by image, so the bytes of a crop do not depend on
what else is in the batch.

On a GPU all of it is queued on a stream of the decoder's own, beside the one that trains. The current stream waits for
the crops it requests; a loader that works ahead requests them inside `on_own_stream` and passes on an event:

    with decoder.on_own_stream():
        crops = decoder.render(images, params)                   # queued, and nothing waits
    ready = decoder.record_event()                               # for data.batch.wait_for_event
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
from data.augment import LUMA, Renderer, ViewParams, round_windows
from data.batch import to_device
from data.pillow_decoder import UndecodableImage, blend_on_colour, decode_with_pillow, has_16_bit_alpha, needs_pillow

_UNDECODABLE = "undecodable image"


class _LazyModule:
    """Import a module of DALI at its first use, so that everything but decoding works where DALI is missing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_import_dali(self._name), attribute)


@cache
def _import_dali(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of packages that DALI imports
            return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}: images are decoded by NVIDIA DALI, which is not installed here; "
            "pip install -c constraints.txt nvidia-dali-cuda130"
        ) from None


types: Any = _LazyModule("nvidia.dali.types")
dali: Any = _LazyModule("nvidia.dali.experimental.dynamic")


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: (height, width, 3) uint8 RGB, in the decoder's own memory."""

    pixels: Any  # a tensor of torch's on CPU, of DALI's on a GPU
    height: int
    width: int
    alpha_HW1: torch.Tensor | None = None  # uint8; set where each view has its own background


class Decoder:
    """Decodes and renders on one device with `threads` CPU threads. Thread-safe: calls of DALI take turns.

    device: "cpu", "gpu" (JPEG decoded by the GPU, other formats by the CPU, all else on the GPU) or "auto":
    gpu when there is one. background: the colour behind transparent images, or "random": a colour for each view.
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
        # On this thread, which selected the rank's GPU: other threads start on GPU 0.
        device_id = torch.cuda.current_device() if self.device == "gpu" else None
        self._device = torch.device("cuda", device_id) if device_id is not None else torch.device("cpu")
        self._stream = torch.cuda.Stream(self._device) if self.device == "gpu" else None
        self._context = dali.EvalContext(num_threads=threads, device_id=device_id, cuda_stream=self._stream)
        self._lock = threading.Lock()
        self._renderer = Renderer(threads) if self.device == "cpu" else None
        self._background = background
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")  # its threads start when needed

    def decode(self, encoded: Sequence[bytes]) -> list[DecodedImage | str]:
        """Return a DecodedImage for each item, or the reason it could not be decoded."""
        by_pillow = {
            i: self._pool.submit(self._decode_with_pillow, data) for i, data in enumerate(encoded) if needs_pillow(data)
        }
        results = self._decode_with_dali(encoded, [i for i in range(len(encoded)) if i not in by_pillow])
        failed = [i for i, item in results.items() if not isinstance(item, DecodedImage)]
        by_pillow |= {i: self._pool.submit(self._decode_with_pillow, encoded[i], failed_dali=True) for i in failed}
        results |= {i: future.result() for i, future in by_pillow.items()}
        results |= self._decode_with_dali(encoded, [i for i, item in results.items() if item is None])
        return [results[i] or _UNDECODABLE for i in range(len(encoded))]

    def to_tensor(self, image: DecodedImage) -> torch.Tensor:
        """Return (height, width, 3) uint8 on the decoder's device, of an image without alpha."""
        assert image.alpha_HW1 is None
        with self.on_own_stream(), self._lock:
            pixels_HW3 = torch.from_dlpack(image.pixels)
            if self._stream is not None:  # DALI takes its own memory back without asking who reads it
                pixels_HW3 = pixels_HW3.clone()
        return self._to_current_stream(pixels_HW3)

    def render(self, images: Sequence[DecodedImage], params: ViewParams) -> torch.Tensor:
        """Return (n, 3, size, size) uint8 RGB: row i shows view i of `params` on image i mod len(images).

        So with the parameters of several views one after the other, the rows come out view-major.
        """
        num_rows = len(params.windows)
        if not num_rows:
            return self.empty_crops(params.size)
        assert num_rows % len(images) == 0, f"{num_rows} views of {len(images)} images"
        shown = [images[i % len(images)] for i in range(num_rows)]
        windows = round_windows(params.windows, [p.height for p in shown], [p.width for p in shown])
        pixels = [p.pixels for p in shown]
        for row, image in enumerate(shown):
            if image.alpha_HW1 is not None:
                pixels[row] = self._blend_window(image, windows[row], params.background[row])
                windows[row] = [0, 0, *pixels[row].shape[:2]]
        if self._renderer is not None:
            return self._renderer.render(pixels, windows, params)
        return self.render_with_dali(pixels, windows, params)

    def render_with_dali(self, pixels: Sequence[Any], windows: NDArray[np.int64], params: ViewParams) -> torch.Tensor:
        """Renderer.render in DALI's operators: used on a GPU, and on CPU the oracle of data/augment.py."""
        with self._dali():
            rows = self._cut(pixels, windows, params.size)
            rows = _apply_to(rows, params.jitter, lambda some, idx: _jitter(some, params, idx))
            rows = _apply_to(rows, params.blur_sigma > 0, lambda some, idx: _blur(some, params, idx))
            crops = dali.crop_mirror_normalize(
                dali.as_batch(rows),
                dtype=types.UINT8,
                output_layout="CHW",
                mirror=_per_row(params.flip, np.int32),
            ).torch(copy=True)
            crops = _solarise(_grey(crops, params.grey), params.solarise)
        return self._to_current_stream(crops)

    def on_own_stream(self) -> AbstractContextManager[Any]:
        """Make the decoder's CUDA stream current inside the `with`; other streams do not wait for its work."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def record_event(self) -> torch.cuda.Event | None:
        """Return a CUDA event that fires when all crops requested so far are ready; None on the CPU, where they are."""
        return None if self._stream is None else self._stream.record_event()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        if self._renderer is not None:
            self._renderer.close()

    def empty_crops(self, size: int) -> torch.Tensor:
        """Return (0, 3, size, size) uint8 on the device: the crops of an objective that is off."""
        return torch.empty((0, 3, size, size), dtype=torch.uint8, device=self._device)

    def _decode_with_dali(self, encoded: Sequence[bytes], idx: Sequence[int]) -> dict[int, DecodedImage | str | None]:
        """Decode the items of these indices."""
        with self._dali():
            return dict(
                zip(idx, self._decode_or_halve([np.frombuffer(encoded[i], np.uint8) for i in idx]), strict=True)
            )

    def _decode_with_pillow(self, data: bytes, failed_dali: bool = False) -> DecodedImage | str | None:
        """Decode with Pillow; None for an image left to DALI: 16 bits a channel and no transparent pixel."""
        try:
            image = decode_with_pillow(data)
        except UndecodableImage:
            return _UNDECODABLE
        if image.mode != "RGBA":
            return None if not failed_dali and has_16_bit_alpha(data) else self._to_image(image.convert("RGB"))
        if self._background != "random":
            return self._to_image(blend_on_colour(image, self._background))
        with self.on_own_stream():
            alpha_HW1 = to_device(torch.from_numpy(np.array(image.getchannel("A")))[:, :, None], self._device)
        return replace(self._to_image(image.convert("RGB")), alpha_HW1=alpha_HW1)

    def _to_image(self, image: Image.Image) -> DecodedImage:
        pixels: Any = np.array(image)
        if self.device == "cpu":
            pixels = torch.from_numpy(pixels)
        else:
            with self._dali():
                pixels = dali.as_tensor(pixels, device="gpu", layout="HWC")
        return DecodedImage(pixels, image.height, image.width)

    def _decode_or_halve(self, encoded: list[NDArray[np.uint8]]) -> list[DecodedImage | str]:
        """Decode with DALI; halve a failing batch until each bad image is alone.

        k bad images of n cost about k log n more calls.
        """
        if not encoded:
            return []
        try:
            batch = dali.decoders.image(dali.as_batch(encoded), device=self.device, output_type=types.RGB).evaluate()
        except RuntimeError:
            if len(encoded) == 1:
                return [_UNDECODABLE]
            half = len(encoded) // 2
            return self._decode_or_halve(encoded[:half]) + self._decode_or_halve(encoded[half:])
        tensors = _rows(batch)
        if self.device == "cpu":
            tensors = [torch.from_dlpack(tensor) for tensor in tensors]
        return [DecodedImage(tensor, *tensor.shape[:2]) for tensor in tensors]

    def _blend_window(self, image: DecodedImage, window: NDArray[np.int64], colour: NDArray[np.uint8]) -> Any:
        """Cut a window of an image with alpha and blend it over a colour; returns the form of DecodedImage.pixels."""
        top, left, bottom, right = window.tolist()
        assert image.alpha_HW1 is not None
        alpha_HW1, colour_3 = image.alpha_HW1[top:bottom, left:right], torch.from_numpy(colour)
        if self.device == "cpu":
            return blend_alpha(image.pixels[top:bottom, left:right], alpha_HW1, colour_3)
        with self._dali():
            pixels_HW3 = torch.from_dlpack(image.pixels)[top:bottom, left:right]
            return dali.as_tensor(blend_alpha(pixels_HW3, alpha_HW1, to_device(colour_3, self._device)), layout="HWC")

    @contextmanager
    def _dali(self) -> Iterator[None]:
        """Hold the lock on DALI inside the `with`, and queue its work on the decoder's stream."""
        with self.on_own_stream(), self._lock, self._context, dali.EvalMode.sync_cpu:
            yield

    def _to_current_stream(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make the current stream wait for a tensor of the decoder's stream, and return the tensor."""
        if self._stream is not None and (current := torch.cuda.current_stream(self._device)) != self._stream:
            current.wait_stream(self._stream)
            tensor.record_stream(current)
        return tensor

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


def blend_alpha(pixels_HW3: torch.Tensor, alpha_HW1: torch.Tensor, colour_3: torch.Tensor) -> torch.Tensor:
    """Blend pixels over a colour on their device, rounding to the nearest integer: bit-equal to
    data.pillow_decoder.blend_on_colour."""
    colour, alpha = colour_3.int(), alpha_HW1.int()
    return ((pixels_HW3.int() * alpha + colour * (255 - alpha) + 127) // 255).to(torch.uint8)


def _apply_to(
    rows: list[Any], active: NDArray[np.bool_], operator: Callable[[Any, NDArray[np.int64]], Any]
) -> list[Any]:
    """Return the rows with the active ones replaced by `operator(batch of them, their indices)`."""
    chosen = np.flatnonzero(active)
    if not len(chosen):
        return rows
    changed = dict(zip(chosen.tolist(), _rows(operator(dali.as_batch([rows[i] for i in chosen]), chosen)), strict=True))
    return [changed.get(i, row) for i, row in enumerate(rows)]


def _jitter(rows: Any, params: ViewParams, idx: NDArray[np.int64]) -> Any:
    """Change hue, saturation, contrast and brightness, in the order DALI fixes; contrast is about mid-grey."""
    return dali.color_twist(
        rows,
        brightness=_per_row(params.brightness[idx]),
        contrast=_per_row(params.contrast[idx]),
        saturation=_per_row(params.saturation[idx]),
        hue=_per_row(params.hue[idx]),
    )


def _blur(rows: Any, params: ViewParams, idx: NDArray[np.int64]) -> Any:
    return dali.gaussian_blur(rows, sigma=_per_row(params.blur_sigma[idx]))


def _grey(crops: torch.Tensor, active: NDArray[np.bool_]) -> torch.Tensor:
    """Replace colours by integer luminance: three equal channels, rounded alike on every device."""
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
    """Return a DALI argument with one value (or one vector) for each row."""
    return dali.as_batch(np.ascontiguousarray(values, dtype))
