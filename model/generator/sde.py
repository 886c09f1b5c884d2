"""The random way from noise to latents along a velocity: SiT's sampler (arXiv 2401.08740, section 2.2, and its code).

Noise added on the way and taken back by the score leaves every x_t distributed as it was. On the straight path
x_t = t latent + (1 - t) noise, with velocity v, the noise in x is x - t v and the score -(x - t v) / (1 - t). Adding
sqrt(2 (1 - t)) dW, what SiT's figures were drawn with, cancels the division:

    dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW = ((1 + t) v - x) dt + sqrt(2 (1 - t)) dW

    euler_maruyama(lambda x, time: field(x, time), noise, added, steps=250)     # Path(end, evaluations=250)
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from model.generator.ode import Field, Path

LAST = 0.04  # of the time is one step, without noise: what would be added there nothing would take back [C]


def euler_maruyama(field: Field, x: Tensor, added: Tensor, steps: int, temperature: float = 1.0) -> Path:
    """Equal steps up to the last. `added` (steps - 1, B, ...) is the noise of all but that; `temperature` scales it."""
    begin_of_last = 1 - LAST if steps > 1 else 0.0
    times = [begin_of_last * step / max(1, steps - 1) for step in range(steps)]
    for (begin, end), noise in zip(pairwise(times), added, strict=True):
        spread = (2 * (1 - begin) * (end - begin)) ** 0.5
        x = x + (end - begin) * _drift(field, x, begin) + temperature * spread * noise
    return Path(x + (1 - begin_of_last) * _drift(field, x, begin_of_last), steps)


def _drift(field: Field, x: Tensor, time: float) -> Tensor:
    return (1 + time) * field(x, time) - x
