"""What the teacher asks for: its prototype logits turned into distributions that cannot collapse.

`sinkhorn` spreads the prototypes evenly over the rows of all ranks (SwAV, DINOv2); `centred` subtracts a
running mean instead (DINO). Both are targets: nothing here has a gradient. Ranks may hold different numbers
of rows.

    targets_RK = sinkhorn(teacher_RK, 0.05, Solo())     # rows sum to 1, columns nearly to R/K
    targets_RK = centred(teacher_RK, centre_K, 0.05)
    centre_K   = follow_centre(centre_K, teacher_RK, 0.9, Solo())
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from model.objectives.comm import Comm


@torch.no_grad()
def sinkhorn(teacher_RK: Float[Tensor, "R K"], temp: float, comm: Comm, iterations: int = 3) -> Float[Tensor, "R K"]:
    """Sinkhorn-Knopp over the rows of all ranks (SwAV, arXiv 2006.09882, appendix A).

        Q = exp(teacher / temp)
        `iterations` times:   Q_rk /= sum_r Q_rk (rows of all ranks),   then  Q_rk /= sum_k Q_rk

    for each iteration:
        divide each prototype by its mass over the rows of all ranks
        divide each row by its sum
    The usual factors 1/K and 1/rows cancel in the row step and are left out. Costs one all-reduce of K
    numbers an iteration, and one more for a maximum that keeps exp finite at any temperature: the first pass
    is done on logarithms, after which rows sum to 1 and neither step can divide by zero.
    """
    score_RK = teacher_RK.float() / temp
    log_mass_K = _all_logsumexp(score_RK, comm)
    target_RK = torch.softmax(score_RK - log_mass_K, dim=1)
    for _ in range(iterations - 1):
        mass_K = comm.all_sum(target_RK.sum(dim=0)).clamp_min_(torch.finfo(torch.float32).tiny)
        target_RK /= mass_K
        target_RK /= target_RK.sum(dim=1, keepdim=True)
    return target_RK


def _all_logsumexp(score_RK: Tensor, comm: Comm) -> Tensor:
    """log sum exp of each column over the rows of all ranks; this rank may have no rows."""
    lowest_K = score_RK.new_full(score_RK.shape[1:], torch.finfo(torch.float32).min)
    top_K = comm.all_max(score_RK.amax(dim=0) if len(score_RK) else lowest_K)
    return top_K + comm.all_sum((score_RK - top_K).exp().sum(dim=0)).log()


@torch.no_grad()
def centred(teacher_RK: Float[Tensor, "R K"], centre_K: Float[Tensor, " K"], temp: float) -> Float[Tensor, "R K"]:
    """softmax((teacher - centre) / temp) row by row (DINO, arXiv 2104.14294, section 3.1)."""
    return torch.softmax((teacher_RK.float() - centre_K) / temp, dim=1)


@torch.no_grad()
def follow_centre(
    centre_K: Float[Tensor, " K"], teacher_RK: Float[Tensor, "R K"], momentum: float, comm: Comm
) -> Float[Tensor, " K"]:
    """momentum * centre + (1 - momentum) * mean of all ranks' rows; the old centre where there are none."""
    num_rows = torch.full_like(centre_K[:1], len(teacher_RK))
    sums = comm.all_sum(torch.cat([teacher_RK.float().sum(dim=0), num_rows]))
    mean_K = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp_min(1), centre_K)
    return centre_K * momentum + mean_K * (1 - momentum)


def cross_entropy(
    student_RK: Float[Tensor, "R K"], target_RK: Float[Tensor, "R K"], temp: float
) -> Float[Tensor, " R"]:
    """-sum_k target_rk * log softmax(student / temp)_rk for each row r; targets need not sum to 1."""
    return -(target_RK * torch.log_softmax(student_RK.float() / temp, dim=1)).sum(dim=1)
