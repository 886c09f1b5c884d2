"""CLIP: the image-text contrastive loss over the pairs of all ranks, with softmax (InfoNCE) or sigmoid (SigLIP).

Each rank scores its own B images against the captions of every rank (A = world_size * B). kernels/contrastive.py
computes the scores in tiles: no rank holds the score matrix, and the averaged gradient is that of the full batch.

    softmax_clip_loss(image_BE, text_BE, scale, Solo()).loss     # ln(A) for unrelated vectors: 2.08 with 8 pairs
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kernels.contrastive import sigmoid_contrast, softmax_contrast
from model.losses.comm import Comm


class ContrastiveLoss(NamedTuple):
    """Loss and accuracy, scalars of one rank; their mean over ranks is that of the batch."""

    loss: Tensor
    accuracy: Tensor  # fraction of this rank's images whose own caption scores highest of all captions; no gradient


def softmax_clip_loss(
    image_BE: Float[Tensor, "B E"], text_BE: Float[Tensor, "B E"], scale: Float[Tensor, " 1"], comm: Comm
) -> ContrastiveLoss:
    """InfoNCE, both directions averaged (OpenCLIP). Vectors are L2-normalised; `scale` multiplies cosines.

        L = 1/2B * sum_i  [ -log softmax_j(scale * image_i . text_j)[i]
                            -log softmax_j(scale * text_i . image_j)[i] ]

    for each own image i: score it against the captions of all ranks
    for each caption of all ranks: merge the ranks' sums of exponentials over their own images
    for each own pair i: add the two cross-entropies with the pair itself as the answer
    divide by 2B

    A score is computed once, by the rank that has the image, and serves both directions; so captions are gathered,
    images are not, and ranks exchange one maximum and one sum for each caption.
    """
    text_AE = comm.gather_with_grad(text_BE.float())
    first = comm.rank * len(image_BE)

    def merge(max_A: Tensor, sum_A: Tensor) -> tuple[Tensor, Tensor]:
        """Each caption's maximum and sum of exponentials over this rank's images -> over all ranks' images."""
        all_max_A = comm.all_max(max_A)
        return all_max_A, comm.all_sum(sum_A * (max_A - all_max_A).exp())

    return ContrastiveLoss(*softmax_contrast(image_BE.float(), text_AE, scale.float(), first, merge))


def sigmoid_clip_loss(
    image_BE: Float[Tensor, "B E"],
    text_BE: Float[Tensor, "B E"],
    scale: Float[Tensor, " 1"],
    bias: Float[Tensor, " 1"],
    comm: Comm,
) -> ContrastiveLoss:
    """SigLIP (arXiv 2303.15343, eq. 1): a binary classification of every (image, caption) pair.

        L = 1/B * sum_i sum_j -log sigmoid( z_ij * (scale * image_i . text_j + bias) )
        z_ij = +1 if i = j else -1

    for each own image i:
        for each caption j of all ranks: add the logistic loss of "j describes i"
    divide by B
    """
    text_AE = comm.gather_with_grad(text_BE.float())
    first = comm.rank * len(image_BE)
    return ContrastiveLoss(*sigmoid_contrast(image_BE.float(), text_AE, scale.float(), bias.float(), first))
