"""clip: an image and its caption find each other among all pairs of all ranks.

Each rank scores its own B rows against the rows of every rank (A = world_size * B) and gathers with gradient,
so no rank holds the whole A x A matrix and the averaged gradient is still that of the full batch.

    softmax_loss(image_BE, text_BE, scale, Solo()).loss     # ln(A) for unrelated vectors: 2.08 with 8 pairs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.objectives.comm import Comm


class Contrast(NamedTuple):
    loss: Tensor
    accuracy: Tensor  # share of this rank's images whose own caption scores highest among all captions; no gradient


def softmax_loss(
    image_BE: Float[Tensor, "B E"], text_BE: Float[Tensor, "B E"], scale: Float[Tensor, " 1"], comm: Comm
) -> Contrast:
    """InfoNCE, both directions averaged (OpenCLIP). Vectors are L2-normalised; `scale` multiplies cosines.

        L = 1/2B * sum_i  [ -log softmax_j(scale * image_i . text_j)[i]
                            -log softmax_j(scale * text_i . image_j)[i] ]

    for each own pair i:
        score image i against the captions of all ranks, text i against the images of all ranks
        add the two cross-entropies with the pair itself as the answer
    divide by 2B
    """
    image_BE, text_BE, scale = image_BE.float(), text_BE.float(), scale.float()
    image_AE, text_AE = comm.gather_with_grad(torch.cat([image_BE, text_BE], dim=1)).chunk(2, dim=1)
    image_logits_BA = scale * image_BE @ text_AE.T
    text_logits_BA = scale * text_BE @ image_AE.T
    answer_B = _own_rows(image_BE, comm)
    loss = (F.cross_entropy(image_logits_BA, answer_B) + F.cross_entropy(text_logits_BA, answer_B)) / 2
    return Contrast(loss, _accuracy(image_logits_BA, answer_B))


def sigmoid_loss(
    image_BE: Float[Tensor, "B E"],
    text_BE: Float[Tensor, "B E"],
    scale: Float[Tensor, " 1"],
    bias: Float[Tensor, " 1"],
    comm: Comm,
) -> Contrast:
    """Every (image, caption) pair is a yes-or-no question (SigLIP, arXiv 2303.15343, eq. 1).

        L = 1/B * sum_i sum_j -log sigmoid( z_ij * (scale * image_i . text_j + bias) )
        z_ij = +1 if i = j else -1

    for each own image i:
        for each caption j of all ranks: add the logistic loss of "j describes i"
    divide by B
    """
    image_BE, scale, bias = image_BE.float(), scale.float(), bias.float()
    logits_BA = scale * image_BE @ comm.gather_with_grad(text_BE.float()).T + bias
    answer_B = _own_rows(image_BE, comm)
    sign_BA = torch.full_like(logits_BA, -1.0).scatter_(1, answer_B[:, None], 1.0)
    loss = -F.logsigmoid(sign_BA * logits_BA).sum() / len(image_BE)
    return Contrast(loss, _accuracy(logits_BA, answer_B))


def _own_rows(own_BE: Tensor, comm: Comm) -> Tensor:
    """Where this rank's rows stand among the gathered ones."""
    return torch.arange(len(own_BE), device=own_BE.device) + comm.rank * len(own_BE)


def _accuracy(logits_BA: Tensor, answer_B: Tensor) -> Tensor:
    return (logits_BA.detach().argmax(dim=1) == answer_B).float().mean()
