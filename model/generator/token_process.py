"""How a token becomes noise and comes back: the diffusion process of the head, with the solvers of whole latents.

    objective   noisy token                                the head predicts    published in
    noise       sqrt(s) token + sqrt(1 - s) noise          noise                MAR (arXiv 2406.11838)
    velocity    time token + (1 - time) noise              token - noise        rectified flow (arXiv 2209.03003)

s is the survival of the cosine schedule, in 1,000 steps (iDDPM, arXiv 2102.09672).

    corrupt("velocity", tokens_RC, noise_RC, uniform_R)         # noisy rows, what tells their times, targets
    generated(predict, noise_KRC, Sampling("euler", steps=25))      # (R, C)

The head is told thousandths: the step, or 1,000 times the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.generator import noising, velocity
from model.generator.sampling import Sampling

Objective = Literal["noise", "velocity"]
# (noisy (R, C), thousandths, time) -> (R, C). The time runs from 0, noise, to 1, a token, whatever the objective.
Predict = Callable[[Tensor, float, float], Tensor]
OFFSET = 0.008  # of the cosine schedule
# Sampling begins at this step of the 1,000. At the last one the signal is 5e-5 of the noise, and an error of the
# prediction would come out 20,000 times as large; here 50 times.
FIRST = 987


class Corrupted(NamedTuple):
    """Rows on their way to noise, and what the head is to say of them. All float32."""

    noisy_RC: Tensor
    thousandths_R: Tensor
    target_RC: Tensor


def corrupt(objective: Objective, tokens_RC: Tensor, noise_RC: Tensor, uniform_R: Tensor) -> Corrupted:
    """Every row where its uniform, in (0, 1), puts it."""
    if objective == "noise":
        step_R = noising.drawn_steps(uniform_R)
        noisy_RC = noising.noised(tokens_RC, noise_RC, step_R, cosine_survival())
        return Corrupted(noisy_RC, step_R.float(), noise_RC)
    noisy_RC = torch.lerp(noise_RC, tokens_RC, uniform_R.unsqueeze(1))
    return Corrupted(noisy_RC, 1000 * uniform_R, tokens_RC - noise_RC)


def generated(predict: Predict, noise_KRC: Tensor, sampling: Sampling) -> Tensor:
    """(R, C) float32 tokens from K = sampling.num_latents (R, C) normals."""
    if sampling.method in ("ddim", "ancestral"):
        return _denoised(predict, noise_KRC, sampling)

    def field(x_RC: Tensor, time: float) -> Tensor:
        return predict(x_RC, 1000 * time, time)

    return velocity.followed(field, noise_KRC, sampling).end


@lru_cache(maxsize=1)
def cosine_survival() -> Tensor:
    """(1000,) float64 on the host: share of a token's variance left after each step, from 1 to 2e-9."""
    ends = torch.arange(1, noising.STEPS + 1, dtype=torch.float64, device="cpu") / noising.STEPS
    survival_S = (math.pi / 2 * (ends + OFFSET) / (1 + OFFSET)).cos() ** 2
    survival_S = survival_S / math.cos(math.pi / 2 * OFFSET / (1 + OFFSET)) ** 2
    survival_S[-1] = 0.001 * survival_S[-2]  # a step leaves at least a thousandth [P]
    return survival_S


def _denoised(predict: Predict, noise_KRC: Tensor, sampling: Sampling) -> Tensor:
    survival_S, count = cosine_survival()[: FIRST + 1], sampling.num_steps

    def noise_in(x_RC: Tensor, step: int) -> noising.Said:
        return noising.Said(predict(x_RC, step, 1 - step / (noising.STEPS - 1)))

    if sampling.method == "ddim":
        return noising.ddim(noise_in, noise_KRC[0], survival_S, count)
    return noising.ancestral(noise_in, noise_KRC[0], survival_S, count, noise_KRC[1:], sampling.temperature)
