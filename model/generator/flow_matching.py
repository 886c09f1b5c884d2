"""Flow matching (SiT, LightningDiT): the straight path, the velocity loss, and solvers that follow the velocity.

    time 0 is noise, time 1 the latent
    x_t      = (1 - t) noise + t latent
    velocity = latent - noise                                     constant along the path

    velocity term  = mean (predicted - velocity)^2                over rows, channels and positions
    direction term = mean 1 - cos(predicted, velocity)            over rows and positions; the angle is between channels
    total          = velocity term + weight * direction term      weight 1: LightningDiT; 0: SiT

One latent number 3 with noise 1, at t = 0.25: x_t = 1.5, velocity 2; a prediction of 1 costs 1 + weight * 0.

ODE solvers from time 0 to time 1: Euler, Heun, and Dormand-Prince with adaptive steps. They count evaluations of the
velocity, which dominate the cost of sampling. Times are Python floats.

    euler(lambda x, time: -x, torch.ones(1), time_grid(100))    # OdeSolution(end=[0.3660], evaluations=100); 0.3679
    heun(lambda x, time: -x, torch.ones(1), time_grid(50))      # [0.3679], 100
    dopri5(lambda x, time: -x, torch.ones(1), 1e-5, 1e-5)       # [0.3679], 31

SiT's stochastic sampler (arXiv 2401.08740, section 2.2, and its code) adds noise and removes it with the score, which
leaves the distribution of every x_t unchanged. On the straight path the noise in x is x - t v and the score
-(x - t v) / (1 - t). With noise of sqrt(2 (1 - t)) dW, as used for SiT's figures, the division cancels:

    dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW = ((1 + t) v - x) dt + sqrt(2 (1 - t)) dW
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from configs.generator import TimeDistribution
from model.generator.sampling import Sampling

# Vectors shorter than this count as this long. A fresh model predicts zeros, where the gradient of the cosine is 1 /
# SHORTEST; at the customary 1e-8 the first step would clip the velocity term away. Latents are of unit variance:
# lengths are near 1.
MIN_LENGTH = 1e-3
LAST_STEP = 0.04  # length of the last step, without noise: nothing would remove noise added there [C]
MIN_STEP = 1e-5  # of dopri5
VelocityField = Callable[[Tensor, float], Tensor]


def sample_times(uniform_B: Tensor, times: TimeDistribution) -> Tensor:
    """Map uniforms (B,) of the open interval (0, 1) to times (B,), distributed as `times` describes."""
    if times.kind == "uniform":
        return uniform_B
    return torch.sigmoid(times.mean + times.std * torch.special.ndtri(uniform_B))


def interpolate(latents_BLhw: Tensor, noise_BLhw: Tensor, time_B: Tensor) -> Tensor:
    """Interpolate each row between noise and latent at its own time: x_t."""
    time_B111 = time_B.view(-1, 1, 1, 1)
    return (1 - time_B111) * noise_BLhw + time_B111 * latents_BLhw


def velocity_terms(
    predicted_BLhw: Tensor, latents_BLhw: Tensor, noise_BLhw: Tensor, direction: float
) -> dict[str, Tensor]:
    """Return the loss terms and their "total", float32 scalars; `direction` is the weight of the direction term."""
    velocity_BLhw = latents_BLhw - noise_BLhw
    terms = {"velocity": F.mse_loss(predicted_BLhw, velocity_BLhw)}
    if not direction:
        return {"total": terms["velocity"], **terms}
    terms["direction"] = (1 - F.cosine_similarity(predicted_BLhw, velocity_BLhw, dim=1, eps=MIN_LENGTH)).mean()
    return {"total": terms["velocity"] + direction * terms["direction"], **terms}


class OdeSolution(NamedTuple):
    """Result of a solver: the value at time 1 and the number of evaluations of the velocity."""

    end: Tensor
    evaluations: int


def integrate(field: VelocityField, noise_S: Tensor, sampling: Sampling) -> OdeSolution:
    """Sample latents from noise with a solver of this objective.

    `noise_S` (S, ...) holds the start, then the noise that the SDE adds; S is `sampling.num_latents`.
    """
    if sampling.method == "dopri5":
        return dopri5(field, noise_S[0], sampling.rtol, sampling.atol)
    if sampling.method == "sde":
        return euler_maruyama(field, noise_S[0], noise_S[1:], sampling.num_steps, sampling.temperature)
    solver = euler if sampling.method == "euler" else heun
    return solver(field, noise_S[0], time_grid(sampling.num_steps, sampling.timestep_shift))


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Times of a solver: steps + 1 from 0 to 1, t' = s t / (1 + (s - 1) t); with a shift s < 1 more are near 0."""
    times = [step / steps for step in range(steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


def euler(field: VelocityField, x: Tensor, times: list[float]) -> OdeSolution:
    """Euler's method, first order: one evaluation a step."""
    for begin, end in pairwise(times):
        x = x + (end - begin) * field(x, begin)
    return OdeSolution(x, len(times) - 1)


def heun(field: VelocityField, x: Tensor, times: list[float]) -> OdeSolution:
    """Heun's method, second order: the mean of the slopes at both ends; two evaluations a step."""
    for begin, end in pairwise(times):
        slope = field(x, begin)
        x = x + (end - begin) / 2 * (slope + field(x + (end - begin) * slope, end))
    return OdeSolution(x, 2 * (len(times) - 1))


def dopri5(field: VelocityField, x: Tensor, rtol: float, atol: float) -> OdeSolution:
    """Dormand-Prince, fifth order, adaptive: a step's error (RMS over the batch, in units of atol + rtol |x|) is <= 1.

    All rows share the steps: a row's result depends on its batch, within the tolerance. Raises UserError where no step
    is short enough, as with a field that is not finite.
    """
    time, slope, evaluations = 0.0, field(x, 0.0), 1
    step = _first_step(x, slope, rtol, atol)
    while time < 1.0:
        slopes = [slope]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            moved = x + step * _weighted(weights, slopes)
            slopes.append(field(moved, time + node * step))
        evaluations += len(_NODES)
        error = _rms(step * _weighted(_ERROR, slopes), atol + rtol * torch.maximum(x.abs(), moved.abs()))
        if error <= 1:  # the last stage is the fifth-order result itself, its slope the next step's first
            time, x, slope = time + step, moved, slopes[-1]
        elif step < MIN_STEP:
            raise UserError(
                f"sampler=dopri5 finds no step short enough at time {time:.4g} (rtol={rtol:g}, atol={atol:g}): it is "
                "held to more than float32 can give, or the generator's output is not finite; raise both, or choose "
                "heun"
            )
        step *= 10.0 if error == 0 else min(10.0, max(0.2, 0.9 * error**-0.2))  # 0.2 where the error is not finite
        if time + step > 1.0 - MIN_STEP:  # no tiny last step is left over
            step = 1.0 - time
    return OdeSolution(x, evaluations)


# Dormand and Prince (1980), table 2: stage times, weights of earlier slopes in each stage, fifth less fourth order.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _first_step(x: Tensor, slope: Tensor, rtol: float, atol: float) -> float:
    """A hundredth of the time in which the field changes x by its own size (Hairer, Norsett, Wanner II.4)."""
    scale = atol + rtol * x.abs()
    size, speed = _rms(x, scale), _rms(slope, scale)
    return min(1.0, 0.01 * size / speed) if size > 1e-5 and speed > 1e-5 else 1e-3


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """The sum of weight times slope; zeros are left out."""
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total.add_(slope, alpha=weight)
    return total


def _rms(x: Tensor, scale: Tensor) -> float:
    return float((x / scale).square().mean().sqrt())


def euler_maruyama(field: VelocityField, x: Tensor, added: Tensor, steps: int, temperature: float = 1.0) -> OdeSolution:
    """SiT's SDE with equal steps up to the last. `added` (steps - 1, B, ...) is the noise of all steps but that;
    `temperature` scales it."""
    begin_of_last = 1 - LAST_STEP if steps > 1 else 0.0
    times = [begin_of_last * step / max(1, steps - 1) for step in range(steps)]
    for (begin, end), noise in zip(pairwise(times), added, strict=True):
        spread = (2 * (1 - begin) * (end - begin)) ** 0.5
        x = x + (end - begin) * _sde_drift(field, x, begin) + temperature * spread * noise
    return OdeSolution(x + (1 - begin_of_last) * _sde_drift(field, x, begin_of_last), steps)


def _sde_drift(field: VelocityField, x: Tensor, time: float) -> Tensor:
    return (1 + time) * field(x, time) - x
