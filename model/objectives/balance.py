"""Two losses weighed by what each asks of one layer: VQGAN's adaptive weight (arXiv 2012.09841, eq. 7), and VA-VAE's.

    total = main + weight * |d main / dW| / (|d other / dW| + 1e-4) * other        W: weight of a linear layer

The weight's gradient is a product of two activations, (d loss / dy)^T x for y = x W^T, so nothing asks for W, which
ZeRO-3 has partitioned away. Gradients are summed over ranks before their norms are taken: the ratio is that of the
whole batch, on any number of ranks.

    adaptive_weight(main_NO, other_NO, input_NI, comm, limit=1e4)       # gradients at y, and x

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
LIMIT = 1e8  # of VA-VAE's published code


@dataclass(frozen=True)
class Balance:
    """How the two losses enter the total: `scale` times (main + `weight` times other)."""

    weight: float
    scale: float
    comm: Comm


@torch.no_grad()
def adaptive_weight(
    main_NO: Float[Tensor, "N O"], other_NO: Float[Tensor, "N O"], input_NI: Float[Tensor, "N I"], comm: Comm,
    limit: float = LIMIT,
) -> Float[Tensor, ""]:  # fmt: skip
    """The ratio above, at most `limit`, float32 on the device. A collective.

    From the gradients of the two losses at a linear layer's output, each of the mean over this rank's rows, and from
    its input. The products are taken in the input's dtype, as the layer's own backward takes them.
    """
    both_OI = torch.stack([gradient.to(input_NI.dtype).T @ input_NI for gradient in (main_NO, other_NO)]).float()
    main, other = torch.linalg.vector_norm(comm.all_sum(both_OI) / comm.world_size, dim=(1, 2))
    return (main / (other + EPS)).clamp(max=limit)


def balanced(latent_NL: Tensor, input_ND: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
    """The latent twice: for the main loss and for the other. `latent` is linear in `input`.

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
        """`main_NL` comes times scale, `other_NL` times scale and weight."""
        balance, (input_ND,) = ctx.balance, ctx.saved_tensors
        unscaled = main_NL / balance.scale, other_NL / (balance.scale * balance.weight)
        ratio = adaptive_weight(*unscaled, input_ND, balance.comm)
        return main_NL + (ratio * other_NL.float()).to(other_NL.dtype), None, None
