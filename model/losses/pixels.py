"""L1 and L2 reconstruction losses of pixels from -1 to 1.

The decoder's output is ImageNet-normalised (as of the released weights), where a step of one grey level is larger in
blue than in green; both losses therefore convert to [-1, 1] first.

    l1_loss(recon, target)         # 2/255 when every pixel is one grey level off
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_signed(x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 3 H W"]:
    """ImageNet-normalised -> float32 from -1, black, to 1, white. Not clamped: values out of range keep their gradient.

    The statistics are Python floats, which need no copy to the GPU each step.
    """
    channels = zip(x.float().unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([channel * (2 * std) + (2 * mean - 1) for channel, mean, std in channels], dim=1)


def l1_loss(recon: Float[Tensor, "R 3 H W"], target: Float[Tensor, "R 3 H W"]) -> Float[Tensor, ""]:
    """L1 of two ImageNet-normalised batches, in [-1, 1] space:  L = 1 / (3RHW) * sum | recon - target |

    for each image, channel and pixel: add the absolute difference
    divide by their number
    """
    difference = (to_signed(recon) - to_signed(target)).abs()
    return difference.sum() / difference.numel()


def l2_loss(recon: Float[Tensor, "R 3 H W"], target: Float[Tensor, "R 3 H W"]) -> Float[Tensor, ""]:
    """L2 of two ImageNet-normalised batches, in [-1, 1] space:  L = 1 / (3RHW) * sum (recon - target)^2

    for each image, channel and pixel: add the square of the difference
    divide by their number
    """
    difference = to_signed(recon) - to_signed(target)
    return difference.square().sum() / difference.numel()
