"""Teacher targets of DINO and iBOT: distributions over prototypes, balanced so that they cannot collapse.

`sinkhorn` spreads the prototypes evenly over the rows of all ranks (SwAV, DINOv2); centring subtracts a running mean
instead (DINO). In both cases a row's target is a softmax of its logits less one number a prototype,

    target_rk = softmax_k(<teacher_r, prototype_k> / temp - bias_k)

so `Targets` holds the teacher's rows and the (K,) bias, and the losses compute targets chunk by chunk
(kernels/prototypes.py); the (rows, K) matrix is never allocated. Nothing here has a gradient. Ranks may hold different
numbers of rows.

    bias_K   = sinkhorn(teacher_RE, teacher_KE, 0.05, Solo())     # rows sum to 1, columns nearly to R/K
    targets  = Targets(teacher_RE, teacher_KE, bias_K, 0.05)
    centre_K = update_centre(centre_K, teacher_RE, teacher_KE, 0.9, Solo())   # bias_K = centre_K / 0.05

The `dense_*` functions compute the same with whole (rows, K) matrices. They are oracles of tests and benches; training
does not use them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.prototypes import TeacherColumnSums
from model.losses.comm import Comm

SINKHORN_ITERATIONS = 3  # of Sinkhorn-Knopp [D of DINOv2]


@dataclass(frozen=True)
class Targets:
    """The inputs of the target distributions softmax(teacher @ prototypes^T / temp - bias), row by row."""

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
    iterations: int = SINKHORN_ITERATIONS,
) -> Float[Tensor, " K"]:
    """Sinkhorn-Knopp over the rows of all ranks (SwAV, arXiv 2006.09882, appendix A); returns the bias of `Targets`.

        Q = exp(teacher @ prototypes^T / temp)
        `iterations` times:   Q_rk /= sum_r Q_rk (rows of all ranks),   then  Q_rk /= sum_k Q_rk

    bias = 0
    for each iteration:
        divide each prototype by its mass over the rows of all ranks:  bias_k += log sum_r Q_rk
        divide each row by its sum:                                    Q = softmax(logits / temp - bias)
    The usual factors 1/K and 1/rows cancel in the row step and are left out. An iteration is one pass over the rows
    and one all-reduce of K numbers; the first has one more, for a maximum that keeps exp finite at any temperature.
    Memory: a few (K,) vectors and a chunk of logits, or all of them where they are few (kernels.prototypes.KEEP_BYTES).
    """
    columns = TeacherColumnSums(teacher_RE, teacher_KE, temp)
    bias_K = _all_logsumexp(columns.logsumexp(), comm)
    for _ in range(iterations - 1):
        mass_K = comm.all_sum(columns.mass(bias_K))
        bias_K = bias_K + mass_K.clamp_min(torch.finfo(torch.float32).tiny).log()
    return bias_K


def _all_logsumexp(own_K: Tensor, comm: Comm) -> Tensor:
    """log sum exp over ranks; a rank without rows contributes float32's lowest number."""
    top_K = comm.all_max(own_K)
    return top_K + comm.all_sum((own_K - top_K).exp()).log()


@torch.no_grad()
def update_centre(
    centre_K: Float[Tensor, " K"],
    teacher_RE: Float[Tensor, "R E"],
    teacher_KE: Float[Tensor, "K E"],
    momentum: float,
    comm: Comm,
) -> Float[Tensor, " K"]:
    """momentum * centre + (1 - momentum) * mean logits of all ranks' rows.

    The centre is unchanged where there are no rows, or where a logit is not finite: a step that is skipped must not
    enter the centre.

    The mean of the logits is the logits of the mean row, so ranks sum E numbers and no logits are computed.
    """
    num_rows = torch.full_like(centre_K[:1], len(teacher_RE))
    sums = comm.all_sum(torch.cat([teacher_RE.float().sum(dim=0), num_rows]))
    mean_K = teacher_KE.float() @ (sums[:-1] / sums[-1].clamp_min(1))
    has_mean = (sums[-1] > 0) & torch.isfinite(sums).all()
    return centre_K * momentum + torch.where(has_mean, mean_K, centre_K) * (1 - momentum)


@torch.no_grad()
def dense_sinkhorn(
    teacher_RK: Float[Tensor, "R K"], temp: float, comm: Comm, iterations: int = 3
) -> Float[Tensor, "R K"]:
    """Oracle of `sinkhorn`: the target distributions themselves, from logits.

    The first iteration is done on logarithms, after which rows sum to 1 and neither step can divide by zero.
    """
    score_RK = teacher_RK.float() / temp
    log_mass_K = _dense_logsumexp(score_RK, comm)
    target_RK = torch.softmax(score_RK - log_mass_K, dim=1)
    for _ in range(iterations - 1):
        mass_K = comm.all_sum(target_RK.sum(dim=0)).clamp_min_(torch.finfo(torch.float32).tiny)
        target_RK /= mass_K
        target_RK /= target_RK.sum(dim=1, keepdim=True)
    return target_RK


def _dense_logsumexp(score_RK: Tensor, comm: Comm) -> Tensor:
    """log sum exp of each column over the rows of all ranks; this rank may have no rows."""
    lowest_K = score_RK.new_full(score_RK.shape[1:], torch.finfo(torch.float32).min)
    top_K = comm.all_max(score_RK.amax(dim=0) if len(score_RK) else lowest_K)
    return top_K + comm.all_sum((score_RK - top_K).exp().sum(dim=0)).log()


@torch.no_grad()
def dense_targets(targets: Targets) -> Float[Tensor, "R K"]:
    """Compute the distributions that `targets` describes."""
    logits_RK = (targets.teacher_RE @ targets.teacher_KE.T).float()
    return torch.softmax(logits_RK / targets.temp - targets.bias_K, dim=1)


def dense_cross_entropy(
    student_RK: Float[Tensor, "R K"], target_RK: Float[Tensor, "R K"], temp: float
) -> Float[Tensor, " R"]:
    """-sum_k target_rk * log softmax(student / temp)_rk of each row r, the oracle; targets need not sum to 1."""
    return -(target_RK * torch.log_softmax(student_RK.float() / temp, dim=1)).sum(dim=1)
