"""clip: an image and its caption find each other among all pairs of all ranks.

Each rank scores its own B images against the captions of every rank (A = world_size * B), in tiles: no rank holds the
matrix of scores, and the averaged gradient is that of the full batch (kernels/contrastive.py).

    softmax_loss(image_BE, text_BE, scale, Solo()).loss     # ln(A) for unrelated vectors: 2.08 with 8 pairs
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kernels.contrastive import sigmoid_contrast, softmax_contrast
from model.objectives.comm import Comm


class Contrast(NamedTuple):
    """Scalars of one rank; the mean over ranks is that of the batch."""

    loss: Tensor
    accuracy: Tensor  # share of this rank's images whose own caption scores highest among all captions; no gradient


def softmax_loss(
    image_BE: Float[Tensor, "B E"], text_BE: Float[Tensor, "B E"], scale: Float[Tensor, " 1"], comm: Comm
) -> Contrast:
    """InfoNCE, both directions averaged (OpenCLIP). Vectors are L2-normalised; `scale` multiplies cosines.

        L = 1/2B * sum_i  [ -log softmax_j(scale * image_i . text_j)[i]
                            -log softmax_j(scale * text_i . image_j)[i] ]

    for each own image i: score it against the captions of all ranks
    for each caption of all ranks: put the ranks' sums of exponentials over their own images together
    for each own pair i: add the two cross-entropies with the pair itself as the answer
    divide by 2B

    A score is computed once, by the rank whose image it is, and serves both directions; so captions travel between
    ranks, images do not, and for a caption's own cross-entropy one number a caption comes back.
    """
    text_AE = comm.gather_with_grad(text_BE.float())
    first = comm.rank * len(image_BE)

    def merge(best_A: Tensor, total_A: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of exponentials over this rank's images -> over those of all ranks."""
        of_all_A = comm.all_max(best_A)
        return of_all_A, comm.all_sum(total_A * (best_A - of_all_A).exp())

    return Contrast(*softmax_contrast(image_BE.float(), text_AE, scale.float(), first, merge))


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
    text_AE = comm.gather_with_grad(text_BE.float())
    first = comm.rank * len(image_BE)
    return Contrast(*sigmoid_contrast(image_BE.float(), text_AE, scale.float(), bias.float(), first))
