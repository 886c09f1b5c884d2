"""DDPM (Ho et al. 2020, as in DiT): latents fade into noise over S steps; a model that predicts it leads back.

    survival_S[s]   share of a latent's variance left after step s, falling from about 1 to about 0
    x_s             = sqrt(survival) latent + sqrt(1 - survival) noise
    loss            = mean (predicted - noise)^2

Back, over some of the steps, from s to the next lower one, r (survival 1 after the last):

    latent          = (x_s - sqrt(1 - survival_s) predicted) / sqrt(survival_s)
    ddim            x_r = sqrt(survival_r) latent + sqrt(1 - survival_r) predicted               (Song et al. 2021)
    ancestral       x_r = a draw of q(x_r | x_s, latent): what DDPM does; its variance is the posterior's, or what the
                    model has learnt of it (model/generator/variance.py)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.generator import variance

STEPS = 1000  # of the schedule [P]


class Said(NamedTuple):
    """What a model says of x (B, ...): the noise in it and, if it has learnt that, its variance's place between the
    bounds."""

    noise: Tensor
    share: Tensor | None = None


Predict = Callable[[Tensor, int], Said]  # (x, step)


@lru_cache(maxsize=1)
def linear_survival() -> Tensor:
    """(S,) float64 on the host: betas from 1e-4 to 0.02 in equal steps [P]."""
    betas_S = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - betas_S, dim=0)


def drawn_steps(uniform_B: Tensor, steps: int = STEPS) -> Tensor:
    """(B,) of the open interval (0, 1) -> as many steps, int64, each equally likely."""
    return (uniform_B * steps).long()


def noised(latents: Tensor, noise: Tensor, step_B: Tensor, survival_S: Tensor) -> Tensor:
    """x_s of each row (B, ...) at its own step."""
    survival_B = variance.at_steps(survival_S, step_B).view(-1, *[1] * (latents.ndim - 1))
    return survival_B.sqrt().float() * latents + (1 - survival_B).sqrt().float() * noise


def back_steps(count: int, steps: int = STEPS) -> list[int]:
    """`count` of the steps, evenly spread from the last to the first; one is the last alone."""
    return torch.linspace(steps - 1, 0, count, dtype=torch.float64).round().int().tolist()


def ddim(predict: Predict, x: Tensor, survival_S: Tensor, count: int) -> Tensor:
    """The deterministic way from noise `x` (B, ...) to latents in `count` predictions."""
    for step, before, after in _stages(survival_S, count):
        noise = predict(x, step).noise
        x = after**0.5 * _latent(x, noise, before) + (1 - after) ** 0.5 * noise
    return x


def ancestral(
    predict: Predict, x: Tensor, survival_S: Tensor, count: int, added: Tensor, temperature: float = 1.0
) -> Tensor:
    """The random way from noise `x` (B, ...) to latents in `count` predictions.

    `added` (count - 1, B, ...) is the noise of each stage but the last, which adds none; `temperature` scales it.
    """
    for stage, (step, before, after) in enumerate(_stages(survival_S, count)):
        said = predict(x, step)
        latent = _latent(x, said.noise, before)
        kept = before / after  # share of the variance at r that is left at s
        mean = (after**0.5 * (1 - kept) * latent + kept**0.5 * (1 - after) * x) / (1 - before)
        x = mean if stage == count - 1 else mean + temperature * _spread(said.share, before, after) * added[stage]
    return x


def _spread(share: Tensor | None, before: float, after: float) -> Tensor | float:
    """The deviation of what a stage adds: the posterior's where none was learnt."""
    if share is None:
        return ((1 - before / after) * (1 - after) / (1 - before)) ** 0.5
    return variance.spread(share, before, after)


def _stages(survival_S: Tensor, count: int) -> list[tuple[int, float, float]]:
    """(step, survival there, survival at the next lower one), from the last step down."""
    steps = back_steps(count, len(survival_S))
    survivals = survival_S.tolist()
    return [(s, survivals[s], survivals[r] if r >= 0 else 1.0) for s, r in zip(steps, [*steps[1:], -1], strict=True)]


def _latent(x: Tensor, noise: Tensor, survival: float) -> Tensor:
    return (x - (1 - survival) ** 0.5 * noise) / survival**0.5
