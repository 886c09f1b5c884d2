"""A generator small enough for a test, of each of the three published kinds.

generator = alive(section(**KINDS["dit"]))      # as after some training: no zeros left from the start
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from configs.generator import DIT, SIT, Diffusion
from model.generator.draws import DrawCounts, RandomDraws, draw
from model.generator.factory import AnyGenerator, build_generator
from model.generator.tokens import LatentShape
from model.initialise import initialise_generator

KINDS: dict[str, dict[str, Any]] = {"lightningdit": {}, "sit": SIT, "dit": DIT}
SHAPE = LatentShape(channels=3, height=4, width=2)
NUM_CLASSES = 5


def section(**settings: Any) -> Diffusion:
    """Two blocks of width 16."""
    return Diffusion(**{"width": 16, "depth": 2, "heads": 2, **settings})


def fresh(section: Diffusion, shape: LatentShape = SHAPE, num_classes: int = NUM_CLASSES) -> AnyGenerator:
    """As before the first step."""
    generator = build_generator(section, shape, num_classes)
    initialise_generator(generator, section, seed=0)
    return generator


def alive(section: Diffusion, shape: LatentShape = SHAPE, num_classes: int = NUM_CLASSES) -> AnyGenerator:
    """Every parameter moved a little, so that all of them count."""
    generator = fresh(section, shape, num_classes)
    random = torch.Generator().manual_seed(1)
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return generator


def rows(needs: DrawCounts, count: int = 6, step: int = 0) -> RandomDraws:
    """The draws of positions 0 .. count - 1."""
    return draw(needs, seed=3, step=step, positions=np.arange(count))


class Exact(nn.Module):
    """In place of a backbone: the best prediction for latents that are normal with this mean and deviation."""

    def __init__(self, kind: str, mean: float, std: float, alphas_cumprod_S: torch.Tensor) -> None:
        super().__init__()
        self.kind, self.mean, self.std, self.alphas_cumprod_S = kind, mean, std, alphas_cumprod_S

    def forward(self, x: torch.Tensor, time_B: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """The expected velocity at time t, or the expected noise at a step, and nothing of its variance."""
        if self.kind == "velocity":
            of_latent, of_noise = time_B, 1 - time_B
        else:
            alphas_cumprod_B = self.alphas_cumprod_S.float()[time_B]
            of_latent, of_noise = alphas_cumprod_B.sqrt(), (1 - alphas_cumprod_B).sqrt()
        of_latent, of_noise = of_latent.view(-1, 1, 1, 1), of_noise.view(-1, 1, 1, 1)
        away = (x - of_latent * self.mean) / (of_latent**2 * self.std**2 + of_noise**2)
        latent, noise = self.mean + of_latent * self.std**2 * away, of_noise * away
        return latent - noise if self.kind == "velocity" else torch.cat((noise, torch.zeros_like(noise)), dim=1)
