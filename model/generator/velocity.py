"""The straight path from noise to a latent, and the loss of its velocity (flow matching; SiT, LightningDiT).

    time 0 is noise, time 1 the latent
    x_t      = (1 - t) noise + t latent
    velocity = latent - noise                                     the same all along the path

    velocity term  = mean (predicted - velocity)^2                over rows, channels and places
    direction term = mean 1 - cos(predicted, velocity)            over rows and places; the angle is between channels
    total          = velocity term + weight * direction term      weight 1: LightningDiT; 0: SiT

One latent number 3 with noise 1, at t = 0.25: x_t = 1.5, velocity 2; a prediction of 1 costs 1 + weight * 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.generator import Times
from model.generator import ode, sde
from model.generator.sampling import Sampling

# Lengths below it count as this. A fresh model predicts zeros, where the gradient of the cosine is 1 / SHORTEST; at the
# customary 1e-8 the first step would clip the velocity term away. Latents are of unit variance: lengths are near 1.
SHORTEST = 1e-3


def drawn_times(uniform_B: Tensor, times: Times) -> Tensor:
    """(B,) of the open interval (0, 1) -> as many times, distributed as `times` says."""
    if times.kind == "uniform":
        return uniform_B
    return torch.sigmoid(times.mean + times.std * torch.special.ndtri(uniform_B))


def on_path(latents_BLhw: Tensor, noise_BLhw: Tensor, time_B: Tensor) -> Tensor:
    """x_t of each row at its own time."""
    time_B111 = time_B.view(-1, 1, 1, 1)
    return (1 - time_B111) * noise_BLhw + time_B111 * latents_BLhw


def velocity_terms(
    predicted_BLhw: Tensor, latents_BLhw: Tensor, noise_BLhw: Tensor, direction: float
) -> dict[str, Tensor]:
    """The loss's terms and their "total", float32 scalars; `direction` is the weight of the angle."""
    velocity_BLhw = latents_BLhw - noise_BLhw
    terms = {"velocity": F.mse_loss(predicted_BLhw, velocity_BLhw)}
    if not direction:
        return {"total": terms["velocity"], **terms}
    terms["direction"] = (1 - F.cosine_similarity(predicted_BLhw, velocity_BLhw, dim=1, eps=SHORTEST)).mean()
    return {"total": terms["velocity"] + direction * terms["direction"], **terms}


def followed(field: ode.Field, noise_S: Tensor, sampling: Sampling) -> ode.Path:
    """From noise to latents by a method of this objective. `noise_S` (S, ...): what it starts from, then what is added;
    S is `sampling.num_latents`."""
    if sampling.method == "dopri5":
        return ode.dopri5(field, noise_S[0], sampling.rtol, sampling.atol)
    if sampling.method == "sde":
        return sde.euler_maruyama(field, noise_S[0], noise_S[1:], sampling.num_steps, sampling.temperature)
    solver = ode.euler if sampling.method == "euler" else ode.heun
    return solver(field, noise_S[0], ode.grid(sampling.num_steps, sampling.timestep_shift))
