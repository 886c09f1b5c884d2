"""Stage 2: pictures that a discriminator takes for real ones.

    disc = discriminator_loss(real_logits, fake_logits, "hinge")       # 1 where all logits are 0
    gan = generator_loss(fake_logits, "hinge")                         # what the decoder adds to its pixel losses

How much `gan` may weigh against pixels is the ratio of model/objectives/balance.py, summed over ranks before norms are
taken. A norm per rank, as published code has it, is larger the fewer pictures a rank holds, because noise does not
cancel in it, and a mean of such norms is no gradient's norm; what travels instead is twice the size of the decoder's
last layer, 6 MB a step for VTP-L.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Kind = Literal["hinge", "vanilla"]


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
