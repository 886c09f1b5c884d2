"""The field's evaluation crop: a picture's centre, resized as ADM's code does it, which published FIDs are computed on.

    adm_crop(pixels_HWC, 256)        # (375, 500, 3) uint8 -> (3, 256, 256) uint8

1. while the short side is at least twice the size, both sides are halved by a box filter
2. the short side is brought to the size by a bicubic filter (a = -1/2), widened where it shrinks
3. the centre is cut out

(guided-diffusion's `center_crop_arr`, taken over by DiT, SiT, LightningDiT and their kin.) A resize goes along rows,
then along columns, rounded to whole numbers in between: Pillow's numbers, to one level of 255, as all its versions
before 13 made them, which begins with the cheaper axis. Along an axis it is a product with a matrix of filter weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def adm_crop(pixels_HWC: Tensor, size: int) -> Tensor:
    """(height, width, 3) uint8 of any sides -> (3, size, size) uint8, on the same device."""
    pixels_CHW = pixels_HWC.permute(2, 0, 1)
    while min(pixels_CHW.shape[1:]) >= 2 * size:
        height, width = pixels_CHW.shape[1:]
        pixels_CHW = _resized(pixels_CHW, height // 2, width // 2, "box")
    height, width = pixels_CHW.shape[1:]
    scale = size / min(height, width)
    pixels_CHW = _resized(pixels_CHW, round(height * scale), round(width * scale), "bicubic")
    top, left = ((side - size) // 2 for side in pixels_CHW.shape[1:])
    return pixels_CHW[:, top : top + size, left : left + size]


def _resized(pixels_CHW: Tensor, height: int, width: int, kind: str) -> Tensor:
    """Rows first, then columns; an axis that keeps its length is left alone."""
    if width != pixels_CHW.shape[2]:
        pixels_CHW = _rounded(pixels_CHW.float() @ _weights(pixels_CHW.shape[2], width, kind).to(pixels_CHW.device).T)
    if height != pixels_CHW.shape[1]:
        pixels_CHW = _rounded(_weights(pixels_CHW.shape[1], height, kind).to(pixels_CHW.device) @ pixels_CHW.float())
    return pixels_CHW


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255).to(torch.uint8)


@lru_cache(64)  # of a corpus's commonest sides
def _weights(length: int, target: int, kind: str) -> Tensor:
    """(target, length): what each pixel of a line adds to each pixel of the resized one; rows sum to 1."""
    kernel, reach = _KERNELS[kind]
    scale = length / target
    widening = max(scale, 1.0)
    centre_T1 = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    first_T1 = (centre_T1 - reach * widening + 0.5).floor()  # pixels that the filter does not reach are left out whole
    last_T1 = (centre_T1 + reach * widening + 0.5).floor()
    place_L = torch.arange(length, dtype=torch.float64)
    weight_TL = kernel((place_L - centre_T1 + 0.5) * (1 / widening))
    weight_TL = torch.where((place_L >= first_T1) & (place_L < last_T1), weight_TL, 0.0)
    return (weight_TL / weight_TL.sum(dim=1, keepdim=True)).float()


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"box": (_box, 0.5), "bicubic": (_bicubic, 2.0)}
