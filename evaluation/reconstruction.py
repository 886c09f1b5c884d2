"""How well latents hold the pixels: PSNR over held-out images, in decibels.

quality = Psnr()
quality.add(images, tokenizer.decode(tokenizer.encode(images)))
quality.result()["psnr_db"]       # mean over images of 10 log10(1 / mean squared error), pixels in [0, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor


class Psnr:
    """The mean over images of each image's PSNR, beside the mean colour's: what saying nothing would reach."""

    def __init__(self) -> None:
        self._images: list[Tensor] = []
        self._mean_colour: list[Tensor] = []

    def add(self, target: Tensor, recon: Tensor) -> None:
        """target, recon: (B, 3, H, W) in [0, 1]."""
        self._images.append(psnr(target, recon))
        self._mean_colour.append(psnr(target, target.mean(dim=(2, 3), keepdim=True).expand_as(target)))

    def result(self) -> dict[str, float]:
        """The means, in decibels."""
        images = torch.cat(self._images)
        return {
            "psnr_db": float(images.mean()),
            "psnr_db_of_mean_colour": float(torch.cat(self._mean_colour).mean()),
            "images": len(images),
        }


def psnr(target: Tensor, recon: Tensor) -> Tensor:
    """(B, 3, H, W) twice, in [0, 1] -> (B,) decibels; an error below one part in 10^10 counts as 100."""
    error_B = (target - recon).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error_B.clamp_min(1e-10))
