"""Alignment of latents with a frozen encoder, as in VA-VAE (arXiv 2501.01423, section 3.2), and its adaptive weight.

    cosine    the projected latent W z of a patch has the direction of the frozen feature of that patch
    distance  the cosine between two patches of an image is the same in latents as in features

Both have a margin within which the loss is 0, so that latents keep room for what pixels need.

    alignment_cosine_loss(projected_RPW, feature_RPW, margin=0.5)      # 0 once every cosine is at least 0.5
    alignment_distance_loss(latent_RPL, feature_RPW, margin=0.25)      # 0 once cosines differ by at most 0.25

The second is of z itself, as in the paper; the code published with it uses W z there too.

The adaptive weight of VQGAN (arXiv 2012.09841, eq. 7), also used by VA-VAE and by model/losses/gan.py, makes two losses
pull equally on one linear layer:

    total = main + weight * |d main / dW| / (|d other / dW| + 1e-4) * other        W: weight of a linear layer

The weight's gradient is a product of two activations, (d loss / dy)^T x for y = x W^T, so W itself, which ZeRO-3 has
partitioned, is not needed. Gradients are summed over ranks before their norms are taken: the ratio is that of the whole
batch, on any number of ranks.

    adaptive_weight(main_NO, other_NO, input_NI, comm, limit=1e4)       # gradients at y, and x
    to_decoder, to_other = balance_gradients(latent_NL, input_ND, AdaptiveBalance(weight=0.1, scale=1.0, comm=Solo()))

`balance_gradients` works inside the one backward pass of a step: both gradients meet at the latent, and their sum,
which continues into the encoder, is already weighted. No second backward through the decoder is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.losses.comm import Comm

NORM_EPS = 1e-4  # added to the other loss's norm [C of VQGAN]
MAX_RATIO = 1e8  # of VA-VAE's published code


def alignment_cosine_loss(
    projected_RPW: Float[Tensor, "R P W"], feature_RPW: Float[Tensor, "R P W"], margin: float
) -> Float[Tensor, ""]:
    """Marginal cosine similarity loss: L = 1 / (RP) * sum relu(1 - margin - cos(W z, f)).

    for each image and patch: by how much its cosine is below 1 - margin; 0 where it is not
    divide by their number
    """
    cosine_RP = F.cosine_similarity(projected_RPW.float(), feature_RPW.float(), dim=-1)
    return F.relu(1 - margin - cosine_RP).mean()


def alignment_distance_loss(
    latent_RPL: Float[Tensor, "R P L"], feature_RPW: Float[Tensor, "R P W"], margin: float
) -> Float[Tensor, ""]:
    """Marginal distance matrix loss: L = 1 / (RPP) * sum relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    for each image and ordered pair of its patches, a patch with itself among them:
        by how much the two cosines differ beyond the margin
    divide by their number
    """
    difference_RPP = _cosines(latent_RPL) - _cosines(feature_RPW)
    return F.relu(difference_RPP.abs() - margin).mean()


def _cosines(x_RPD: Tensor) -> Tensor:
    """(R, P, P): cosine of every patch with every patch of its image."""
    unit_RPD = F.normalize(x_RPD.float(), dim=-1)
    return unit_RPD @ unit_RPD.transpose(1, 2)


@dataclass(frozen=True)
class AdaptiveBalance:
    """Weights of the two losses in the total: `scale` times (main + `weight` times other)."""

    weight: float
    scale: float
    comm: Comm


def balance_gradients(latent_NL: Tensor, input_ND: Tensor, balance: AdaptiveBalance) -> tuple[Tensor, Tensor]:
    """Return the latent twice, for the main loss and for the other; `latent` is linear in `input`.

    Backward gives the latent main's gradient plus `weight` times that of the other, scaled to main's length.
    """
    main_NL, other_NL = _Balanced.apply(latent_NL, input_ND, balance)
    return main_NL, other_NL


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent_NL: Tensor, input_ND: Tensor, balance: AdaptiveBalance) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ND)
        ctx.balance = balance
        return latent_NL.view_as(latent_NL), latent_NL.view_as(latent_NL)

    @staticmethod
    def backward(ctx: Any, main_NL: Tensor, other_NL: Tensor) -> tuple[Tensor, None, None]:
        """`main_NL` arrives multiplied by scale, `other_NL` by scale and weight."""
        balance, (input_ND,) = ctx.balance, ctx.saved_tensors
        unscaled = main_NL / balance.scale, other_NL / (balance.scale * balance.weight)
        ratio = adaptive_weight(*unscaled, input_ND, balance.comm)
        return main_NL + (ratio * other_NL.float()).to(other_NL.dtype), None, None


@torch.no_grad()
def adaptive_weight(
    main_NO: Float[Tensor, "N O"], other_NO: Float[Tensor, "N O"], input_NI: Float[Tensor, "N I"], comm: Comm,
    limit: float = MAX_RATIO,
) -> Float[Tensor, ""]:  # fmt: skip
    """The ratio of gradient norms |main| / |other|, at most `limit`, float32 on the device. A collective.

    Computed from the gradients of the two losses at a linear layer's output, each of the mean over this rank's rows,
    and from its input. The products are taken in the input's dtype, as the layer's own backward takes them.
    """
    both_OI = torch.stack([gradient.to(input_NI.dtype).T @ input_NI for gradient in (main_NO, other_NO)]).float()
    main, other = torch.linalg.vector_norm(comm.all_sum(both_OI) / comm.world_size, dim=(1, 2))
    return (main / (other + NORM_EPS)).clamp(max=limit)
