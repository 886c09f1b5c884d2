"""How far DDPM's way back may stray, learnt (Nichol and Dhariwal, arXiv 2102.09672, as in DiT).

Of x_s a step leads back to x_r; r = s - 1 in training. What x_r varies by lies between two bounds: the posterior's
variance, which is right for data of a single latent, and beta, the variance of the noise added in between, right for
latents that are noise themselves. The model says for every number where, in logarithms:

    share        = (said + 1) / 2
    log variance = share * log beta + (1 - share) * log posterior
    bound        = KL(q(x_r | x_s, latent) || the model's x_r), in bits a number; at the first step, which leads to the
                   latent itself, minus the log of its density

The mean is the noise's affair: the bound's gradient stops there. DiT's code takes the first step's likelihood over the
256 levels of a picture, which latents do not have; one step of a thousand.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from configs.generator import Diffusion


def outputs(section: Diffusion) -> int:
    """Numbers that are predicted for one of a latent: noise or velocity alone, or what is said of the variance too."""
    return 2 if section.variance == "learnt" else 1


def share(said: Tensor) -> Tensor:
    """What the model says -> the place between the bounds: 0 the least variance, 1 the most."""
    return (said + 1) / 2


def spread(share: Tensor, before: float, after: float) -> Tensor:
    """The deviation that x_r is drawn with: survival `before` at s, and `after`, below 1, at r."""
    beta = 1 - before / after
    least, most = math.log(beta * (1 - after) / (1 - before)), math.log(beta)
    return torch.exp((share * most + (1 - share) * least) / 2)


def bound(said: Tensor, noise: Tensor, x: Tensor, latents: Tensor, step_B: Tensor, survival_S: Tensor) -> Tensor:
    """The mean bound of rows (B, ...), () float32, each at its own step; `noise` is the predicted one."""
    by_step = _schedule(survival_S)
    signal, rest, of_latent, least, most = (
        at_steps(values_S, step_B).float().view(-1, *[1] * (x.ndim - 1)) for values_S in by_step
    )
    log_variance = share(said) * most + (1 - share(said)) * least
    predicted = (x - rest * noise.detach()) / signal
    off = (of_latent * (latents - predicted)).square() * torch.exp(-log_variance)
    to_x_r = log_variance - least + torch.exp(least - log_variance) - 1 + off
    to_latent = math.log(2 * math.pi) + log_variance + off
    is_first = (step_B == 0).view(-1, *[1] * (x.ndim - 1))
    return torch.where(is_first, to_latent, to_x_r).mean() / (2 * math.log(2))


def at_steps(values_S: Tensor, step_B: Tensor) -> Tensor:
    """(S,) on the host -> (B,): the value at each row's own step, where the steps are."""
    return (values_S if step_B.device == values_S.device else _copied(values_S, step_B.device))[step_B]


@lru_cache(maxsize=16)
def _copied(values_S: Tensor, device: torch.device) -> Tensor:
    """Once and not in every step: a copy out of ordinary host memory waits for all that is queued on the device."""
    return values_S.to(device)


class _Schedule(NamedTuple):
    """By step, float64 on the host."""

    signal_S: Tensor  # sqrt(survival)
    rest_S: Tensor  # sqrt(1 - survival)
    of_latent_S: Tensor  # the latent's share in the mean of x_r
    least_S: Tensor  # both bounds, as logarithms
    most_S: Tensor


@lru_cache(maxsize=2)
def _schedule(survival_S: Tensor) -> _Schedule:
    before_S = survival_S.to("cpu", torch.float64)
    after_S = torch.cat((before_S.new_ones(1), before_S[:-1]))
    beta_S = 1 - before_S / after_S
    posterior_S = beta_S * (1 - after_S) / (1 - before_S)
    posterior_S[0] = posterior_S[1]  # the first step's is 0, which has no logarithm [C]
    of_latent_S = after_S.sqrt() * beta_S / (1 - before_S)
    return _Schedule(before_S.sqrt(), (1 - before_S).sqrt(), of_latent_S, posterior_S.log(), beta_S.log())
