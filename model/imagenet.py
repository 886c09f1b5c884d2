"""Conversion between pixels as users have them and the ImageNet-normalised pixels of trunk and decoder.

    normalise(images_uint8)       # 0 .. 255 -> about -2.1 .. 2.6, float32
    normalise(images_float)       # the same from 0 .. 1
    denormalise(recon)            # back to 0 .. 1, clamped

Pretrainer and VisualTokenizer convert here, so users never see normalised pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses.pixels import IMAGENET_MEAN, IMAGENET_STD


def normalise(pixels: Tensor) -> Tensor:
    """Normalise (B, 3, height, width), uint8 or float in [0, 1]: (x - mean) / std per channel, float32.

    The channels' statistics are Python floats: a tensor would be rounded in a bf16 model, or copied each step.
    """
    scale = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    pairs = zip(pixels.float().unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([channel * (scale / std) - mean / std for channel, mean, std in pairs], dim=1)


def denormalise(pixels: Tensor) -> Tensor:
    """Convert ImageNet-normalised (B, 3, height, width) to [0, 1], float32, clamped."""
    pairs = zip(pixels.float().unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([channel * std + mean for channel, mean, std in pairs], dim=1).clamp(0, 1)
