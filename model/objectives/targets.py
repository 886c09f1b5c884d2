"""What the teacher asks for: distributions over prototypes that cannot collapse, none of them written out.

`sinkhorn` spreads the prototypes evenly over the rows of all ranks (SwAV, DINOv2); centring subtracts a running mean
instead (DINO). Either way a row's target is a softmax of its logits less one number a prototype,

    target_rk = softmax_k(<teacher_r, prototype_k> / temp - bias_k)

so `Targets` holds the teacher's rows and the (K,) bias, and whoever needs a target computes it chunk by chunk
(kernels/prototypes.py). Nothing here has a gradient. Ranks may hold different numbers of rows.

    bias_K   = sinkhorn(teacher_RE, teacher_KE, 0.05, Solo())     # rows sum to 1, columns nearly to R/K
    targets  = Targets(teacher_RE, teacher_KE, bias_K, 0.05)
    centre_K = follow_centre(centre_K, teacher_RE, teacher_KE, 0.9, Solo())   # bias_K = centre_K / 0.05
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.prototypes import TeacherColumns
from model.objectives.comm import Comm

ITERATIONS = 3  # of Sinkhorn-Knopp [D of DINOv2]


@dataclass(frozen=True)
class Targets:
    """softmax(teacher @ prototypes^T / temp - bias), row by row: what it is computed from."""

    teacher_RE: Tensor  # (R, E) L2-normalised
    teacher_KE: Tensor  # (K, E) the teacher's prototypes
    bias_K: Tensor  # (K,) float32
    temp: float


@torch.no_grad()
def sinkhorn(
    teacher_RE: Float[Tensor, "R E"],
    teacher_KE: Float[Tensor, "K E"],
    temp: float,
    comm: Comm,
    iterations: int = ITERATIONS,
) -> Float[Tensor, " K"]:
    """Sinkhorn-Knopp over the rows of all ranks (SwAV, arXiv 2006.09882, appendix A), as a bias.

        Q = exp(teacher @ prototypes^T / temp)
        `iterations` times:   Q_rk /= sum_r Q_rk (rows of all ranks),   then  Q_rk /= sum_k Q_rk

    bias = 0
    for each iteration:
        divide each prototype by its mass over the rows of all ranks:  bias_k += log sum_r Q_rk
        divide each row by its sum:                                    Q = softmax(logits / temp - bias)
    The usual factors 1/K and 1/rows cancel in the row step and are left out. An iteration is one pass over the rows
    and one all-reduce of K numbers; the first has one more, for a maximum that keeps exp finite at any temperature.
    Held: a few (K,) vectors and a chunk of logits, or all of them where they are few (kernels.prototypes.KEEP_BYTES).
    """
    columns = TeacherColumns(teacher_RE, teacher_KE, temp)
    bias_K = _all_logsumexp(columns.logsumexp(), comm)
    for _ in range(iterations - 1):
        mass_K = comm.all_sum(columns.mass(bias_K))
        bias_K = bias_K + mass_K.clamp_min(torch.finfo(torch.float32).tiny).log()
    return bias_K


def _all_logsumexp(own_K: Tensor, comm: Comm) -> Tensor:
    """log sum exp over ranks; a rank without rows brings float32's lowest number."""
    top_K = comm.all_max(own_K)
    return top_K + comm.all_sum((own_K - top_K).exp()).log()


@torch.no_grad()
def follow_centre(
    centre_K: Float[Tensor, " K"],
    teacher_RE: Float[Tensor, "R E"],
    teacher_KE: Float[Tensor, "K E"],
    momentum: float,
    comm: Comm,
) -> Float[Tensor, " K"]:
    """momentum * centre + (1 - momentum) * mean logits of all ranks' rows; the old centre where there are none, and
    where one is no number: a step that is left out must not stay in the centre.

    The mean of the logits is the logits of the mean row, so ranks sum E numbers and no logits are computed.
    """
    num_rows = torch.full_like(centre_K[:1], len(teacher_RE))
    sums = comm.all_sum(torch.cat([teacher_RE.float().sum(dim=0), num_rows]))
    mean_K = teacher_KE.float() @ (sums[:-1] / sums[-1].clamp_min(1))
    has_mean = (sums[-1] > 0) & torch.isfinite(sums).all()
    return centre_K * momentum + torch.where(has_mean, mean_K, centre_K) * (1 - momentum)
