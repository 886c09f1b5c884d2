"""Cross-entropy between student and teacher prototype distributions, without the (rows, K) matrices of both.

Student and teacher rows are compared with K = 65,536 prototypes each; the teacher's softmax is the student's target.
The plain formula allocates a dozen matrices of (rows, K): with 4,096 rows and 65,536 prototypes one is 1 GiB. Here one
chunk of rows is computed at a time, and logits that are needed again are computed again. Every target has the form

    target_rk = softmax_k(<teacher_r, prototype_k> / temp - bias_k)

centring with bias = centre / temp, Sinkhorn-Knopp with bias = the log of the columns' masses, all iterations in one
vector: a row's own scaling is the softmax's denominator. Memory beyond inputs and gradients: (K,) vectors, the float32
sum of the prototypes' gradient, CHUNK_BYTES a matrix for the current chunk, and a teacher's logits between the passes
of Sinkhorn where they take no more than KEEP_BYTES.

    mass_K = TeacherColumnSums(teacher_RE, teacher_KE, 0.05).mass(bias_K)      # one pass of Sinkhorn over own rows
    loss = prototype_cross_entropy(student_RUE, student_KE, teacher_RVE, teacher_KE, bias_K, weight_RU, 0.1, 0.05)
    loss.backward()             # the gradients were computed together with the loss, and are only scaled

Letters beyond model/__init__.py: G groups, each of U student rows that share V target rows; R any rows; E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Bytes of one chunk of logits (float32; on a GPU of their differences, in the features' dtype). CPU: two chunks stay in
# the last-level cache. GPU: large enough to keep the device busy.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
KEEP_BYTES = {"cpu": 32 * 2**20, "cuda": 0}  # of a teacher's logits, from one pass of Sinkhorn to the next
MIN_ROWS = 128  # with fewer, reading the prototypes anew for every chunk takes longer than the products


class TeacherColumnSums:
    """Sums over this rank's teacher rows (R, E) for each prototype, as Sinkhorn-Knopp needs them.

    Every pass computes the logits again, unless all of them together take no more than KEEP_BYTES. On CUDA
    kernels/prototypes_triton.py computes the sums, tile by tile.
    """

    def __init__(self, teacher_RE: Tensor, prototypes_KE: Tensor, temp: float) -> None:
        num_rows, num_prototypes = len(teacher_RE), len(prototypes_KE)
        self._teacher_RE, self._prototypes_KE, self._temp = teacher_RE.detach(), prototypes_KE.detach(), temp
        if teacher_RE.is_cuda:
            return
        self._zero_K = prototypes_KE.new_zeros(num_prototypes, dtype=torch.float32)
        is_small = 4 * num_rows * num_prototypes <= KEEP_BYTES["cpu"]
        self._kept_RK = (self._teacher_RE @ self._prototypes_KE.T).float() if is_small else None
        self._logits = LogitChunks(self._prototypes_KE, num_rows)

    @torch.no_grad()
    def logsumexp(self) -> Tensor:
        """log sum_r exp(<teacher_r, prototype_k> / temp), (K,) float32, without overflow at any size of logits.

        Without rows the result is float32's lowest number, which adds nothing to other ranks' sums.
        """
        if self._teacher_RE.is_cuda:
            from kernels.prototypes_triton import column_logsumexp

            return column_logsumexp(self._teacher_RE, self._prototypes_KE, self._temp)
        top_K, sum_K = torch.full_like(self._zero_K, torch.finfo(torch.float32).min), self._zero_K
        for logits_RK, work_RK in self._chunks():
            before_K, top_K = top_K, torch.maximum(top_K, logits_RK.amax(dim=0) / self._temp)
            torch.add(-top_K, logits_RK, alpha=1 / self._temp, out=work_RK).exp_()
            sum_K = sum_K * (before_K - top_K).exp() + work_RK.sum(dim=0)
        return torch.where(sum_K > 0, top_K + sum_K.log(), top_K)

    @torch.no_grad()
    def mass(self, bias_K: Tensor) -> Tensor:
        """Total target mass of each prototype: sum_r softmax_k(<teacher_r, prototype_k> / temp - bias_k), (K,).

        One pass over the rows normalises rows and sums the columns for the next iteration.
        """
        if self._teacher_RE.is_cuda:
            from kernels.prototypes_triton import column_mass

            return column_mass(self._teacher_RE, self._prototypes_KE, self._temp, bias_K)
        mass_K = torch.zeros_like(bias_K)
        for logits_RK, work_RK in self._chunks():
            torch.add(-bias_K, logits_RK, alpha=1 / self._temp, out=work_RK)
            mass_K += torch.softmax(work_RK, dim=1, out=work_RK).sum(dim=0)
        return mass_K

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 logits of some rows, and a buffer to work in, which may be the same tensor."""
        for rows in _slices(len(self._teacher_RE), self._logits.num_rows):
            if self._kept_RK is None:
                logits_RK = self._logits.of(self._teacher_RE[rows])
                yield logits_RK, logits_RK
            else:
                kept_RK = self._kept_RK[rows]
                yield kept_RK, self._logits.buffer(len(kept_RK))


@torch.no_grad()
def target_entropy_and_mean(
    teacher_RE: Tensor, prototypes_KE: Tensor, temp: float, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Entropy of each row's target in nats, (R,) float32, and each prototype's mean probability over the rows, (K,)."""
    chunk = LogitChunks(prototypes_KE, len(teacher_RE))
    entropies, sum_K = [bias_K.new_zeros(0)], torch.zeros_like(bias_K)
    for rows in _slices(len(teacher_RE), chunk.num_rows):
        target_RK = chunk.targets(teacher_RE[rows], temp, bias_K)
        entropies.append(torch.special.entr(target_RK).sum(dim=1))
        sum_K += target_RK.sum(dim=0)
    return torch.cat(entropies), sum_K / max(1, len(teacher_RE))


def prototype_cross_entropy(
    student_GUE: Tensor,
    student_KE: Tensor,
    teacher_GVE: Tensor,
    teacher_KE: Tensor,
    bias_K: Tensor,
    weight_GU: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """sum_gu weight_gu * H(mean_v target_gv, softmax(<student_gu, student prototypes> / student_temp)), () float32.

    Each of a group's U student rows is compared with the mean of the group's V targets; gradients go to `student_GUE`
    and `student_KE` alone. Products are taken in the features' dtype, everything else in float32.
    The gradient is computed together with the loss, while the chunk's logits are there, and held until backward, which
    can run once. kernels/prototypes_triton.py computes both on CUDA, chunked_loss_and_gradients elsewhere.
    """
    loss: Tensor = _CrossEntropy.apply(
        student_GUE, student_KE, teacher_GVE, teacher_KE, bias_K, weight_GU, student_temp, teacher_temp
    )
    return loss


def prototype_cross_entropy_reference(
    student_GUE: Tensor,
    student_KE: Tensor,
    teacher_GVE: Tensor,
    teacher_KE: Tensor,
    bias_K: Tensor,
    weight_GU: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Oracle of `prototype_cross_entropy`: all logits at once, differentiated by autograd."""
    with torch.no_grad():
        target_GVK = torch.softmax((teacher_GVE @ teacher_KE.T).float() / teacher_temp - bias_K, dim=2)
    log_p_GUK = torch.log_softmax((student_GUE @ student_KE.T).float() / student_temp, dim=2)
    return -(weight_GU[..., None] * target_GVK.mean(dim=1, keepdim=True) * log_p_GUK).sum()


def chunked_loss_and_gradients(
    student_GUE: Tensor,
    student_KE: Tensor,
    teacher_GVE: Tensor,
    teacher_KE: Tensor,
    bias_K: Tensor,
    weight_GU: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () float32 and its gradients of `student_GUE` and `student_KE`, in plain PyTorch, chunk by chunk.

        z = student logits / student_temp;  p = softmax(z);  q = mean of the group's targets
        loss += weight * (logsumexp(z) - q . z);   dz = weight * (p - q) / student_temp
        grad_student = dz @ prototypes;            grad_prototypes += dz^T @ student

    The weight scales rows, so it goes to the (rows, E) side of both products and p - q stays of order one.
    """
    (num_groups, num_students, _), num_targets = student_GUE.shape, teacher_GVE.shape[1]
    loss = bias_K.new_zeros(())
    grad_student_GUE = torch.zeros_like(student_GUE)
    students = LogitChunks(student_KE, num_groups * num_students, num_students)
    teachers = LogitChunks(teacher_KE, num_groups * num_targets, num_targets)
    step = min(students.num_rows // max(num_students, 1), teachers.num_rows // num_targets)
    grad_KE = torch.zeros_like(student_KE, dtype=torch.float32 if step < num_groups else None)
    scale_GU1 = weight_GU.unsqueeze(2) / student_temp
    for groups in _slices(num_groups if num_students else 0, step):
        q_RK = teachers.targets(teacher_GVE[groups].flatten(0, 1), teacher_temp, bias_K)
        q_G1K = q_RK.unsqueeze(1) if num_targets == 1 else _mean_of(q_RK, num_targets)
        z_GUK = students.of(student_GUE[groups].flatten(0, 1)).mul_(1 / student_temp).unflatten(0, (-1, num_students))
        top_GU, agreement_GU = z_GUK.amax(dim=2), torch.linalg.vecdot(z_GUK, q_G1K)
        p_GUK = torch.softmax(z_GUK, dim=2, out=z_GUK)
        lse_GU = top_GU - p_GUK.amax(dim=2).log()  # the largest p is exp(top - lse)
        loss += (weight_GU[groups] * (lse_GU - agreement_GU)).sum()
        dz_RK = students.narrow(p_GUK.sub_(q_G1K).flatten(0, 1))
        x_GUE = (student_GUE[groups] * scale_GU1[groups]).to(student_GUE.dtype)
        grad_student_GUE[groups] = (dz_RK @ student_KE).unflatten(0, (-1, num_students)) * scale_GU1[groups]
        _add_product(grad_KE, dz_RK.T, x_GUE.flatten(0, 1))
    return loss, grad_student_GUE, grad_KE.to(student_KE.dtype)


class LogitChunks:
    """Compute logits of one chunk of rows against all prototypes at a time, in buffers shared by all chunks of a pass.

    The buffers hold `num_rows` rows: whole groups of `group`, at most the `total` there are.
    """

    def __init__(self, prototypes_KE: Tensor, total: int, group: int = 1) -> None:
        num_prototypes, group = len(prototypes_KE), max(group, 1)
        fitting = max(MIN_ROWS, CHUNK_BYTES["cuda" if prototypes_KE.is_cuda else "cpu"] // (4 * num_prototypes))
        self.num_rows = max(1, min(fitting, total) // group) * group
        self._prototypes_KE = prototypes_KE
        self._float_RK = prototypes_KE.new_empty((self.num_rows, num_prototypes), dtype=torch.float32)
        self._narrow_RK = self._float_RK
        if prototypes_KE.dtype != torch.float32:
            self._narrow_RK = prototypes_KE.new_empty(self._float_RK.shape)

    def buffer(self, num_rows: int) -> Tensor:
        """The first rows of the float32 buffer, with whatever values they hold."""
        return self._float_RK[:num_rows]

    def of(self, x_RE: Tensor) -> Tensor:
        """<x_r, prototype_k>, float32, in the buffer: valid until the next call."""
        float_RK, narrow_RK = self.buffer(len(x_RE)), self._narrow_RK[: len(x_RE)]
        torch.mm(x_RE, self._prototypes_KE.T, out=narrow_RK)
        return float_RK if self._narrow_RK is self._float_RK else float_RK.copy_(narrow_RK)

    def targets(self, x_RE: Tensor, temp: float, bias_K: Tensor) -> Tensor:
        """softmax(logits / temp - bias), float32, in the buffer."""
        logits_RK = self.of(x_RE)
        torch.add(-bias_K, logits_RK, alpha=1 / temp, out=logits_RK)
        return torch.softmax(logits_RK, dim=1, out=logits_RK)

    def narrow(self, y_RK: Tensor) -> Tensor:
        """Cast `y_RK`, which lies in the buffer, to the dtype of the prototypes."""
        return y_RK if self._narrow_RK is self._float_RK else self._narrow_RK[: len(y_RK)].copy_(y_RK)


def _slices(total: int, step: int) -> Iterator[slice]:
    """Slices of `step` rows that cover 0 .. total; the last may be shorter."""
    return (slice(first, first + step) for first in range(0, total, step))


def _mean_of(q_RK: Tensor, num_targets: int) -> Tensor:
    return q_RK.unflatten(0, (-1, num_targets)).mean(dim=1, keepdim=True)


def _add_product(sum_KE: Tensor, left_KR: Tensor, right_RE: Tensor) -> None:
    """sum += left @ right; products of a narrower dtype are summed in float32."""
    if left_KR.dtype == sum_KE.dtype:
        sum_KE.addmm_(left_KR, right_RE)
    else:
        sum_KE += left_KR @ right_RE


class _CrossEntropy(torch.autograd.Function):
    """Compute loss and gradients together in forward; backward scales them in place, so it runs once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        compute: Callable[..., tuple[Tensor, Tensor, Tensor]] = chunked_loss_and_gradients
        if inputs[0].is_cuda:
            from kernels.prototypes_triton import loss_and_gradients

            compute = partial(loss_and_gradients, chunk_bytes=CHUNK_BYTES["cuda"])
        loss, grad_student_GUE, grad_KE = compute(*inputs)
        ctx.save_for_backward(grad_student_GUE, grad_KE)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_student_GUE, grad_KE = ctx.saved_tensors
        return grad_student_GUE.mul_(grads[0]), grad_KE.mul_(grads[0]), *[None] * 6
