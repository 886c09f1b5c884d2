"""DDPM (Ho et al. 2020, as in DiT): the noise schedule, DDIM and ancestral sampling, and the learned variance.

    alphas_cumprod_S[s]   fraction of a latent's variance left after step s, falling from about 1 to about 0
    x_s                   = sqrt(alphas_cumprod) latent + sqrt(1 - alphas_cumprod) noise
    loss                  = mean (predicted - noise)^2

Sampling goes over some of the steps, from s to the next lower one, r (alphas_cumprod 1 after the last):

    latent          = (x_s - sqrt(1 - alphas_cumprod_s) predicted) / sqrt(alphas_cumprod_s)
    ddim            x_r = sqrt(alphas_cumprod_r) latent + sqrt(1 - alphas_cumprod_r) predicted    (Song et al. 2021)
    ancestral       x_r = a sample of q(x_r | x_s, latent), as in DDPM, with the posterior's variance or the learned one

The learned variance (Nichol and Dhariwal, arXiv 2102.09672, as in DiT) lies between two bounds: the posterior's
variance, right for data of a single latent, and beta, the variance of the noise added in between, right for latents
that are noise themselves. The model predicts for every number a raw value in between, in logarithms; r = s - 1 in
training:

    variance_fraction = (raw + 1) / 2
    log variance      = variance_fraction * log beta + (1 - variance_fraction) * log posterior
    bound             = KL(q(x_r | x_s, latent) || the model's x_r), in bits a number; at the first step, which leads to
                        the latent itself, minus the log of its density

The bound's gradient does not reach the predicted noise. DiT's code computes the first step's likelihood over the 256
levels of a pixel, which latents do not have; it is one step of a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from configs.generator import Diffusion

NUM_TIMESTEPS = 1000  # of the schedule [P]


class NoisePrediction(NamedTuple):
    """Prediction for x (B, ...): the noise in it and, if learned, the variance's position between its bounds."""

    noise: Tensor
    variance_fraction: Tensor | None = None


NoisePredictor = Callable[[Tensor, int], NoisePrediction]  # (x, step)


@lru_cache(maxsize=1)
def linear_alphas_cumprod() -> Tensor:
    """The linear schedule, (S,) float64 on the host: betas from 1e-4 to 0.02 in equal steps [P]."""
    betas_S = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - betas_S, dim=0)


def sample_timesteps(uniform_B: Tensor, steps: int = NUM_TIMESTEPS) -> Tensor:
    """Map uniforms (B,) of the open interval (0, 1) to steps (B,), int64, each equally likely."""
    return (uniform_B * steps).long()


def add_noise(latents: Tensor, noise: Tensor, step_B: Tensor, alphas_cumprod_S: Tensor) -> Tensor:
    """Add noise to each row (B, ...) up to its own step: x_s."""
    alphas_cumprod_B = values_at_steps(alphas_cumprod_S, step_B).view(-1, *[1] * (latents.ndim - 1))
    return alphas_cumprod_B.sqrt().float() * latents + (1 - alphas_cumprod_B).sqrt().float() * noise


def ddim_sample(predict: NoisePredictor, x: Tensor, alphas_cumprod_S: Tensor, count: int) -> Tensor:
    """DDIM: deterministic sampling from noise `x` (B, ...) to latents in `count` predictions."""
    for step, before, after in _stages(alphas_cumprod_S, count):
        noise = predict(x, step).noise
        x = after**0.5 * _latent(x, noise, before) + (1 - after) ** 0.5 * noise
    return x


def ancestral_sample(
    predict: NoisePredictor, x: Tensor, alphas_cumprod_S: Tensor, count: int, added: Tensor, temperature: float = 1.0
) -> Tensor:
    """DDPM: ancestral sampling from noise `x` (B, ...) to latents in `count` predictions.

    `added` (count - 1, B, ...) is the noise of each stage but the last, which adds none; `temperature` scales it.
    """
    for stage, (step, before, after) in enumerate(_stages(alphas_cumprod_S, count)):
        prediction = predict(x, step)
        latent = _latent(x, prediction.noise, before)
        kept = before / after  # fraction of the variance at r that is left at s
        mean = (after**0.5 * (1 - kept) * latent + kept**0.5 * (1 - after) * x) / (1 - before)
        is_last = stage == count - 1
        std = 0.0 if is_last else _posterior_std(prediction.variance_fraction, before, after)
        x = mean if is_last else mean + temperature * std * added[stage]
    return x


def _posterior_std(variance_fraction: Tensor | None, before: float, after: float) -> Tensor | float:
    """Standard deviation of the noise that a stage adds: the learned one, else the posterior's."""
    if variance_fraction is None:
        return ((1 - before / after) * (1 - after) / (1 - before)) ** 0.5
    return learned_std(variance_fraction, before, after)


def _stages(alphas_cumprod_S: Tensor, count: int) -> list[tuple[int, float, float]]:
    """(step, alphas_cumprod there, alphas_cumprod at the next lower one), from the last step down."""
    steps = back_steps(count, len(alphas_cumprod_S))
    alphas_cumprod = alphas_cumprod_S.tolist()
    return [
        (s, alphas_cumprod[s], alphas_cumprod[r] if r >= 0 else 1.0)
        for s, r in zip(steps, [*steps[1:], -1], strict=True)
    ]


def back_steps(count: int, steps: int = NUM_TIMESTEPS) -> list[int]:
    """Choose `count` steps, evenly spaced from the last to the first; a single one is the last."""
    return torch.linspace(steps - 1, 0, count, dtype=torch.float64).round().int().tolist()


def _latent(x: Tensor, noise: Tensor, alpha_cumprod: float) -> Tensor:
    return (x - (1 - alpha_cumprod) ** 0.5 * noise) / alpha_cumprod**0.5


def outputs_per_number(section: Diffusion) -> int:
    """Outputs per number of a latent: noise or velocity alone, or the variance too."""
    return 2 if section.variance == "learnt" else 1


def variance_fraction(raw: Tensor) -> Tensor:
    """Map the model's raw output to a position between the bounds: 0 the least variance, 1 the most."""
    return (raw + 1) / 2


def learned_std(variance_fraction: Tensor, before: float, after: float) -> Tensor:
    """Standard deviation of x_r; alphas_cumprod is `before` at s, and `after`, below 1, at r."""
    beta = 1 - before / after
    least, most = math.log(beta * (1 - after) / (1 - before)), math.log(beta)
    return torch.exp((variance_fraction * most + (1 - variance_fraction) * least) / 2)


def variational_bound(
    raw: Tensor, noise: Tensor, x: Tensor, latents: Tensor, step_B: Tensor, alphas_cumprod_S: Tensor
) -> Tensor:
    """Mean of the bound over rows (B, ...), () float32, each at its own step; `noise` is the predicted noise."""
    by_step = _schedule(alphas_cumprod_S)
    signal, rest, of_latent, least, most = (
        values_at_steps(values_S, step_B).float().view(-1, *[1] * (x.ndim - 1)) for values_S in by_step
    )
    log_variance = variance_fraction(raw) * most + (1 - variance_fraction(raw)) * least
    predicted = (x - rest * noise.detach()) / signal
    off = (of_latent * (latents - predicted)).square() * torch.exp(-log_variance)
    to_x_r = log_variance - least + torch.exp(least - log_variance) - 1 + off
    to_latent = math.log(2 * math.pi) + log_variance + off
    is_first = (step_B == 0).view(-1, *[1] * (x.ndim - 1))
    return torch.where(is_first, to_latent, to_x_r).mean() / (2 * math.log(2))


class _Schedule(NamedTuple):
    """Constants of the bound by step, float64 on the host."""

    signal_S: Tensor  # sqrt(alphas_cumprod)
    rest_S: Tensor  # sqrt(1 - alphas_cumprod)
    of_latent_S: Tensor  # coefficient of the latent in the mean of x_r
    least_S: Tensor  # logarithms of both bounds of the variance
    most_S: Tensor


@lru_cache(maxsize=2)
def _schedule(alphas_cumprod_S: Tensor) -> _Schedule:
    before_S = alphas_cumprod_S.to("cpu", torch.float64)
    after_S = torch.cat((before_S.new_ones(1), before_S[:-1]))
    beta_S = 1 - before_S / after_S
    posterior_S = beta_S * (1 - after_S) / (1 - before_S)
    posterior_S[0] = posterior_S[1]  # the first step's is 0, which has no logarithm [C]
    of_latent_S = after_S.sqrt() * beta_S / (1 - before_S)
    return _Schedule(before_S.sqrt(), (1 - before_S).sqrt(), of_latent_S, posterior_S.log(), beta_S.log())


def values_at_steps(values_S: Tensor, step_B: Tensor) -> Tensor:
    """(S,) on the host -> (B,) on the device of `step_B`: the value at each row's own step."""
    return (values_S if step_B.device == values_S.device else _on_device(values_S, step_B.device))[step_B]


@lru_cache(maxsize=16)
def _on_device(values_S: Tensor, device: torch.device) -> Tensor:
    """Copied once, not in every step: a copy from pageable host memory waits for all work queued on the device."""
    return values_S.to(device)
