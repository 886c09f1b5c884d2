"""Stage 2: pictures that a discriminator takes for real ones, and how much that may weigh against pixels.

    disc = discriminator_loss(real_logits, fake_logits, "hinge")       # 1 where all logits are 0
    gan = generator_loss(fake_logits, "hinge")                         # what the decoder adds to its pixel losses
    weight = adaptive_weight(of_pixels, of_gan, tokens_TD, comm, limit=1e4)

The adaptive weight (arXiv 2012.09841, eq. 7) keeps the two pulls on the decoder's last layer W equally long:

    weight = |d pixels / dW| / (|d gan / dW| + eps),   at most `limit`

Under ZeRO-3 W is in pieces and its gradient exists nowhere as a whole. But W is a linear layer, y = x W^T + b, so
d loss / dW = (d loss / dy)^T x exactly: what is needed is the layer's input x and the gradients at its output, no
parameter. They are summed over ranks BEFORE the norm is taken: the weight is then that of the whole batch, one number
on all ranks, and 1 rank is 2 ranks. (A norm per rank, as published code has it, is larger the fewer pictures a rank
holds, because noise does not cancel in it; a mean of such norms is no gradient's norm.) What travels is twice the size
of W, 6 MB a step for VTP-L.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.objectives.comm import Comm

Kind = Literal["hinge", "vanilla"]
EPS = 1e-4  # added to the norm of the adversarial gradient


def discriminator_loss(real: Float[Tensor, "R 1 h w"], fake: Float[Tensor, "R 1 h w"], kind: Kind) -> Float[Tensor, ""]:
    """Of the logits of real pictures and of reconstructions.

        hinge:    L = 1/2 mean max(0, 1 - real) + 1/2 mean max(0, 1 + fake)
        vanilla:  L = 1/2 mean -log sigmoid(real) + 1/2 mean -log sigmoid(-fake)

    for each patch of a real picture: ask for a logit above 1 (hinge), or as high as can be (vanilla)
    for each patch of a reconstruction: ask for one below -1, or as low as can be
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Float[Tensor, "R 1 h w"], kind: Kind) -> Float[Tensor, ""]:
    """Of the logits of reconstructions, with gradient to the pictures.

    hinge:    L = mean -fake
    vanilla:  L = mean -log sigmoid(fake)      the non-saturating form (arXiv 1406.2661, section 3)
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


@torch.no_grad()
def adaptive_weight(
    pixels_TF: Float[Tensor, "T F"],
    gan_TF: Float[Tensor, "T F"],
    tokens_TD: Float[Tensor, "T D"],
    comm: Comm,
    limit: float,
) -> Float[Tensor, ""]:
    """The ratio above, from the gradients of the two losses at the last layer's output and from its input.

    A collective. The products are taken in the dtype of `tokens_TD`, as the layer's own backward takes them.
    """
    both_FD = torch.stack([grad.to(tokens_TD.dtype).T @ tokens_TD for grad in (pixels_TF, gan_TF)]).float()
    norm_pixels, norm_gan = torch.linalg.vector_norm(comm.all_sum(both_FD) / comm.world_size, dim=(1, 2))
    return (norm_pixels / (norm_gan + EPS)).clamp(max=limit)
