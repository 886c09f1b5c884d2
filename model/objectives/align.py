"""rec, beside pixels: the latents follow the features of a frozen encoder, as in VA-VAE (arXiv 2501.01423, sec. 3.2).

    cosine    the projected latent W z of a patch points where the feature of that patch points
    distance  two patches of an image are as alike in latents as they are in features

Both have a margin within which nothing is asked, so that latents keep room for what pixels need.

    cosine_loss(projected_RPW, feature_RPW, margin=0.5)          # 0 once every cosine is at least 0.5
    distance_loss(latent_RPL, feature_RPW, margin=0.25)          # 0 once no pair's cosines differ by more than 0.25

The second is of z itself, as the paper has it; the code published with it takes W z there too.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cosine_loss(
    projected_RPW: Float[Tensor, "R P W"], feature_RPW: Float[Tensor, "R P W"], margin: float
) -> Float[Tensor, ""]:
    """L = 1 / (RP) * sum relu(1 - margin - cos(W z, f)), the marginal cosine similarity loss.

    for each image and patch: how far its cosine is below 1 - margin; 0 where it is not
    divide by their number
    """
    cosine_RP = F.cosine_similarity(projected_RPW.float(), feature_RPW.float(), dim=-1)
    return F.relu(1 - margin - cosine_RP).mean()


def distance_loss(
    latent_RPL: Float[Tensor, "R P L"], feature_RPW: Float[Tensor, "R P W"], margin: float
) -> Float[Tensor, ""]:
    """L = 1 / (RPP) * sum relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin), the marginal distance matrix loss.

    for each image and ordered pair of its patches, a patch with itself among them:
        how far the two cosines are apart, beyond the margin
    divide by their number
    """
    difference_RPP = _cosines(latent_RPL) - _cosines(feature_RPW)
    return F.relu(difference_RPP.abs() - margin).mean()


def _cosines(x_RPD: Tensor) -> Tensor:
    """(R, P, P): of every patch with every patch of its image."""
    unit_RPD = F.normalize(x_RPD.float(), dim=-1)
    return unit_RPD @ unit_RPD.transpose(1, 2)
