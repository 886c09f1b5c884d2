"""The ssl losses with every (rows, K) matrix written out: oracles. The step never comes here.

Tests hold targets.py, self_distill.py and masked_patch.py against these; the bench shows what they cost.

    target_RK = sinkhorn(teacher_RE @ teacher_KE.T, 0.05, comm)
    loss = (weight_R * cross_entropy(student_RE @ student_KE.T, target_RK, 0.1)).sum()
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from model.objectives.comm import Comm
from model.objectives.targets import Targets


@torch.no_grad()
def sinkhorn(teacher_RK: Float[Tensor, "R K"], temp: float, comm: Comm, iterations: int = 3) -> Float[Tensor, "R K"]:
    """The distributions of targets.sinkhorn from logits, the matrix divided in place.

    The first iteration is done on logarithms, after which rows sum to 1 and neither step can divide by zero.
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
def written_out(targets: Targets) -> Float[Tensor, "R K"]:
    """The distributions that `targets` stands for."""
    logits_RK = (targets.teacher_RE @ targets.teacher_KE.T).float()
    return torch.softmax(logits_RK / targets.temp - targets.bias_K, dim=1)


def cross_entropy(
    student_RK: Float[Tensor, "R K"], target_RK: Float[Tensor, "R K"], temp: float
) -> Float[Tensor, " R"]:
    """-sum_k target_rk * log softmax(student / temp)_rk for each row r; targets need not sum to 1."""
    return -(target_RK * torch.log_softmax(student_RK.float() / temp, dim=1)).sum(dim=1)
