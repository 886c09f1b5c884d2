"""Two losses of one layer weighed by what each asks of it: VQGAN's adaptive weight, taken up by VA-VAE.

    total = main + weight * |G_main| / (|G_other| + 1e-4) * other          G: gradient of a linear layer's weight

The weight's gradient is a product of two activations, what comes into the layer and the gradient of what leaves it,
so nothing asks for the weight itself, which ZeRO-3 has partitioned away:

    weight_gradient(input_NI, gradient_NO)      # (O, I), this rank's rows
    adaptive_weight(main_OI, other_OI)          # () |main| / (|other| + 1e-4), at most 1e8

`balanced` does it inside the one backward pass of a step: both gradients meet where the latent forks, and the sum that
goes on into the encoder is already weighed. No second backward through the decoder is needed.

    to_decoder, to_other = balanced(latent_NL, input_ND, Balance(weight=0.1, scale=1.0, comm=Solo()))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from model.objectives.comm import Comm

EPS = 1e-4  # added to the other loss's norm [C of VQGAN]
LARGEST = 1e8  # [C of VQGAN]


@dataclass(frozen=True)
class Balance:
    """How the two losses entered the total: `scale` times (main + `weight` times other)."""

    weight: float
    scale: float
    comm: Comm  # norms are of the gradient of the whole batch, the same on every rank


def weight_gradient(input_NI: Float[Tensor, "N I"], gradient_NO: Float[Tensor, "N O"]) -> Float[Tensor, "O I"]:
    """Of y = x W^T: dL/dW = (dL/dy)^T x, in float32, without autograd."""
    return gradient_NO.detach().float().T @ input_NI.detach().float()


def adaptive_weight(main: Tensor, other: Tensor) -> Float[Tensor, ""]:
    """|main| / (|other| + 1e-4) of two gradients of one tensor, at most 1e8; stays on the device."""
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in (main, other)]
    return (norms[0] / (norms[1] + EPS)).clamp(max=LARGEST).detach()


def balanced(latent_NL: Tensor, input_ND: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
    """The latent twice: for the main loss and for the other. `latent` is linear in `input`, without a bias.

    Backward gives the latent main's gradient and `weight` times that of the other, scaled to main's length.
    """
    main_NL, other_NL = _Balanced.apply(latent_NL, input_ND, balance)
    return main_NL, other_NL


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent_NL: Tensor, input_ND: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ND)
        ctx.balance = balance
        return latent_NL.view_as(latent_NL), latent_NL.view_as(latent_NL)

    @staticmethod
    def backward(ctx: Any, main_NL: Tensor, other_NL: Tensor) -> tuple[Tensor, None, None]:
        """`main_NL` comes times scale, `other_NL` times scale and weight; both of this rank's mean."""
        balance, (input_ND,) = ctx.balance, ctx.saved_tensors
        local = torch.stack([weight_gradient(input_ND, gradient) for gradient in (main_NL, other_NL)])
        main, other = balance.comm.all_sum(local) / (balance.comm.world_size * balance.scale)
        ratio = adaptive_weight(main, other / balance.weight)
        return main_NL + (ratio * other_NL.float()).to(other_NL.dtype), None, None
