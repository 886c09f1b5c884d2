"""Images of a run: reconstructions under their originals, latents as colours.

png(reconstructions(target, recon))                        # bytes of a file: row of originals, row of reconstructions
latent_colors(latent_RLhw, scale=8)                       # first three principal components as red, green, blue
"""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def reconstructions(target: Tensor, *recons: Tensor, columns: int = 8) -> Tensor:
    """Stack rows of at most `columns` images: originals, reconstructions, other reconstructions of the same.

    target, recons: (R, 3, H, W) in [0, 1]. Returns (3, rows * H, columns * W) in [0, 1]; NaN is black.
    """
    rows = torch.cat([_row(images[:columns]) for images in (target, *recons)], dim=1)
    return rows.nan_to_num(nan=0.0).clamp(0, 1)


def latent_colours(latent: Tensor, scale: int, columns: int = 8) -> Tensor:
    """Show the first three principal components of the latents of all shown images as RGB, each stretched to [0, 1].

    latent: (R, L, h, w). One channel is shown in grey, two in red and green, non-finite latents in black.
    Returns (3, h * scale, columns * w * scale).
    """
    shown = latent[:columns].float()
    images, channels, height, width = shown.shape
    points = shown.permute(0, 2, 3, 1).reshape(-1, channels)
    colours, is_finite = points.new_zeros(len(points), 3), points.isfinite().all(dim=1)
    if is_finite.any():
        colours[is_finite] = _principal_colours(points[is_finite])
    colours = colours.reshape(images, height, width, 3)
    return _row(F.interpolate(colours.permute(0, 3, 1, 2), scale_factor=scale, mode="nearest"))


def _principal_colours(points: Tensor) -> Tensor:
    """Map (n, L) finite points to (n, 3) in [0, 1]: their first three principal components, fewer where L < 3."""
    points = points - points.mean(0)
    _, _, components = torch.linalg.svd(points, full_matrices=False)
    colours = points @ components[:3].T
    low, high = colours.amin(0), colours.amax(0)
    colours = (colours - low) / (high - low).clamp_min(1e-12)
    missing = 3 - colours.shape[1]
    return colours.expand(-1, 3) if missing == 2 else F.pad(colours, (0, missing))


def png(image: Tensor) -> bytes:
    """Encode a (3, H, W) image in [0, 1] as a PNG file; NaN is black."""
    pixels = (image.detach().float().cpu().nan_to_num(nan=0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def _row(images: Tensor) -> Tensor:
    return torch.cat(list(images), dim=-1)
