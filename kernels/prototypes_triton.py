"""The prototype cross-entropy and Sinkhorn's passes in Triton: logits live in registers, tile by tile.

Same contracts as chunked_loss_and_gradients and TeacherColumnSums (kernels/prototypes.py). Work is laid out in pairs,
one student row against one target row; in a group of U students and V targets pair p is student p // V and
target (p // (U*V)) * V + p % V. Two kernels, each a matrix product whose tile is used before it would be written:

    _logsumexp     rows against prototypes: log-sum-exp of a tile's logits, for the student and for the teacher
    _differences   pairs against prototypes, once both sums are known: dz = weight (p - q) / student_temp, -q . log p

dz is written, `chunk_bytes` of it at a time, because both gradients are plain products of it, which cuBLAS computes:
student = dz @ prototypes, prototypes = dz^T @ student. Per pair and prototype that is six products and not the eight
which a kernel takes that computes the logits again for each gradient (docs/decisions/triton_kernels.md). Sinkhorn's
sums over rows for each prototype are _logsumexp with the sides exchanged.

No size is a compile-time constant, so a dtype is compiled once, whatever the batch; only divisibility by 16 of the
width and of the number of prototypes, which decides how wide loads and stores are, makes a variant of its own.

    loss, grad_student_GUE, grad_KE = loss_and_gradients(student_GUE, student_KE, teacher_GVE, ..., chunk_bytes)
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments have Triton's types, decided at each call)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def _tile(itemsize: int, block_k: int) -> dict[str, int]:
    """Sizes and options of a kernel; BLOCK_E is 128 bytes, the widest rows that shared memory swizzles."""
    return {"BLOCK_R": 128, "BLOCK_K": block_k, "BLOCK_E": 128 // itemsize, "num_warps": 8, "num_stages": 3}


# By the bytes of a number of the features. In bf16 two blocks fit on a multiprocessor of Hopper, so that one computes
# exponentials while the other multiplies (tests/kernels/test_triton_code.py), and one on every GPU that has bf16.
LOGSUMEXP = {2: _tile(2, 128), 4: _tile(4, 64)}
DIFFERENCES = {2: _tile(2, 64), 4: _tile(4, 64)}
WANTED_BLOCKS = 128  # of a product of cuBLAS's: about one for every multiprocessor of the largest GPUs
GROUP = tl.constexpr(32)  # blocks of rows that share prototypes: 4,096 rows of 256 in bf16 are 2 MiB
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))  # exp2 is an instruction, exp a multiplication more: it goes into the temperature


@triton.jit
def _load(pointer, rows, columns, E):
    """Load some columns of some rows of an (R, E) matrix; zeros beyond its width."""
    inside = (columns < E)[None, :]
    return tl.load(pointer + rows[:, None].to(tl.int64) * E + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(x, x_rows, w, w_rows, E, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    """x[x_rows] @ w[w_rows].T as (BLOCK_R, BLOCK_K) float32; a loop over the width whose loads run ahead of it."""
    sum_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for first in range(0, E, BLOCK_E):
        columns = first + tl.arange(0, BLOCK_E)
        x_RE, w_KE = _load(x, x_rows, columns, E), _load(w, w_rows, columns, E)
        sum_RK = tl.dot(x_RE, tl.trans(w_KE), sum_RK, input_precision="tf32x3")  # has no effect on bf16 inputs
    return sum_RK


@triton.jit
def _tile_indices(num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows and columns of this program's tile, and the number of its block of columns.

    Programs that run at the same time share GROUP blocks of rows and a few of columns, so that either side is read from
    memory about once and then from L2.
    """
    row_blocks, column_blocks = tl.cdiv(num_rows, BLOCK_R), tl.cdiv(num_columns, BLOCK_K)
    in_group, first = tl.program_id(0) % (GROUP * column_blocks), tl.program_id(0) // (GROUP * column_blocks) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    rows = (first + in_group % group) * BLOCK_R + tl.arange(0, BLOCK_R)
    return rows, in_group // group * BLOCK_K + tl.arange(0, BLOCK_K), in_group // group


@triton.jit(do_not_specialize=["num_rows", "K"])
def _logsumexp(
    x, prototypes, bias, lse, num_rows, K, E, inverse_temp,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program a tile; writes the tile's log-sum-exps, (blocks of prototypes, R) float32."""
    rows, columns, column_block = _tile_indices(num_rows, K, BLOCK_R, BLOCK_K)
    row_idx, column_idx = tl.minimum(rows, num_rows - 1), tl.minimum(columns, K - 1)
    z_RK = _product(x, row_idx, prototypes, column_idx, E, BLOCK_R, BLOCK_K, BLOCK_E)
    bias_K = tl.load(bias + columns, mask=columns < K, other=float("inf"))  # beyond K: probability 0
    z_RK = z_RK * (inverse_temp * LOG2E) - (bias_K * LOG2E)[None, :]
    top_R = tl.max(z_RK, 1)
    lse_R = (top_R + tl.log2(tl.sum(tl.exp2(z_RK - top_R[:, None]), 1))) * LN2
    tl.store(lse + column_block.to(tl.int64) * num_rows + rows, lse_R, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_pairs", "U", "V"])
def _differences(
    student, student_prototypes, teacher, teacher_prototypes, bias, student_lse, teacher_lse, scale, dz, loss,
    num_pairs, U, V, K, E, inverse_student_temp, inverse_teacher_temp,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program a tile; writes dz (P, K) = scale (p - q) in its dtype, and the tile's part of the cross-entropy
    -q . log p, (blocks of prototypes, P) float32."""
    pairs, columns, column_block = _tile_indices(num_pairs, K, BLOCK_R, BLOCK_K)
    pair_idx, column_idx = tl.minimum(pairs, num_pairs - 1), tl.minimum(columns, K - 1)
    x_idx, t_idx = pair_idx // V, pair_idx // (U * V) * V + pair_idx % V
    z_PK = _product(student, x_idx, student_prototypes, column_idx, E, BLOCK_R, BLOCK_K, BLOCK_E)
    s_PK = _product(teacher, t_idx, teacher_prototypes, column_idx, E, BLOCK_R, BLOCK_K, BLOCK_E)
    bias_K = tl.load(bias + columns, mask=columns < K, other=float("inf"))
    z_PK = z_PK * (inverse_student_temp * LOG2E) - (tl.load(student_lse + x_idx) * LOG2E)[:, None]  # log2 p
    s_PK = s_PK * (inverse_teacher_temp * LOG2E) - (tl.load(teacher_lse + t_idx) * LOG2E)[:, None]
    q_PK = tl.exp2(s_PK - (bias_K * LOG2E)[None, :])
    is_pair = pairs < num_pairs
    to = column_block.to(tl.int64) * num_pairs + pairs
    tl.store(loss + to, tl.sum(q_PK * z_PK, 1) * -LN2, mask=is_pair)
    dz_PK = (tl.exp2(z_PK) - q_PK) * tl.load(scale + pair_idx)[:, None]
    to_PK = dz + pairs[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(to_PK, dz_PK.to(dz.dtype.element_ty), mask=is_pair[:, None] & (columns < K)[None, :])


def column_logsumexp(teacher_RE: Tensor, prototypes_KE: Tensor, temp: float) -> Tensor:
    """TeacherColumnSums.logsumexp: the kernel of rows against prototypes, with the sides exchanged."""
    if not len(teacher_RE):
        return teacher_RE.new_full((len(prototypes_KE),), torch.finfo(torch.float32).min, dtype=torch.float32)
    no_bias_R = teacher_RE.new_zeros(len(teacher_RE), dtype=torch.float32)
    return _lse(prototypes_KE.contiguous(), teacher_RE.contiguous(), no_bias_R, temp)


def column_mass(teacher_RE: Tensor, prototypes_KE: Tensor, temp: float, bias_K: Tensor) -> Tensor:
    """TeacherColumnSums.mass: a row's log-sum-exp is its bias when the columns are summed.

    sum_r softmax_k(z_r - bias)_k = exp(log sum_r exp(z_rk - lse_r) - bias_k)
    """
    if not len(teacher_RE):
        return torch.zeros_like(bias_K)
    teacher_RE, prototypes_KE, bias_K = teacher_RE.contiguous(), prototypes_KE.contiguous(), bias_K.contiguous()
    lse_R = _lse(teacher_RE, prototypes_KE, bias_K, temp)
    return (_lse(prototypes_KE, teacher_RE, lse_R, temp) - bias_K).exp()


def loss_and_gradients(
    student_GUE: Tensor,
    student_KE: Tensor,
    teacher_GVE: Tensor,
    teacher_KE: Tensor,
    bias_K: Tensor,
    weight_GU: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () float32 and its gradients of `student_GUE` and `student_KE`; `chunk_bytes` of differences at a time."""
    (num_groups, num_students, width), num_targets = student_GUE.shape, teacher_GVE.shape[1]
    num_prototypes, pairs_of_group = len(student_KE), num_students * num_targets
    loss, no_bias_K = bias_K.new_zeros(()), torch.zeros_like(bias_K)
    if num_groups * pairs_of_group == 0:
        return loss, torch.zeros_like(student_GUE), torch.zeros_like(student_KE)
    student_KE, teacher_KE, bias_K = student_KE.contiguous(), teacher_KE.contiguous(), bias_K.contiguous()
    bytes_of_group = student_KE.element_size() * num_prototypes * pairs_of_group
    num_chunks = triton.cdiv(num_groups, max(1, chunk_bytes // bytes_of_group))
    step = triton.cdiv(num_groups, num_chunks)  # equal chunks: a short last one would leave a GPU half idle
    buffer_PK = student_KE.new_empty(step * pairs_of_group, num_prototypes)
    grad_student_GUE = torch.empty_like(student_GUE)
    grad_KE = torch.zeros_like(student_KE, dtype=torch.float32 if step < num_groups else None)
    scale_GU, tile = weight_GU / (student_temp * num_targets), DIFFERENCES[student_KE.element_size()]
    for first in range(0, num_groups, step):
        groups = slice(first, first + step)
        x_RE, t_RE = (rows_GNE[groups].contiguous().flatten(0, 1) for rows_GNE in (student_GUE, teacher_GVE))
        scale_P = scale_GU[groups].flatten().repeat_interleave(num_targets)
        dz_PK = buffer_PK[: len(scale_P)]
        student_lse_R = _lse(x_RE, student_KE, no_bias_K, student_temp)
        teacher_lse_R = _lse(t_RE, teacher_KE, bias_K, teacher_temp)
        loss_BP = bias_K.new_empty(_blocks(num_prototypes, tile), len(scale_P))
        _differences[_grid(len(scale_P), num_prototypes, tile)](
            x_RE, student_KE, t_RE, teacher_KE, bias_K, student_lse_R, teacher_lse_R, scale_P, dz_PK, loss_BP,
            len(scale_P), num_students, num_targets, num_prototypes, width, 1 / student_temp, 1 / teacher_temp, **tile,
        )  # fmt: skip
        loss += student_temp * (loss_BP.sum(dim=0) * scale_P).sum()
        grad_UVE = _split_product(dz_PK, student_KE).view(-1, num_students, num_targets, width)
        grad_student_GUE[groups] = grad_UVE.sum(dim=2)
        x_PE = x_RE if num_targets == 1 else x_RE.repeat_interleave(num_targets, dim=0)
        if grad_KE.dtype == dz_PK.dtype:
            grad_KE.addmm_(dz_PK.T, x_PE)
        else:  # products of a narrower dtype are summed in float32
            grad_KE += dz_PK.T @ x_PE
    return loss, grad_student_GUE, grad_KE.to(student_KE.dtype)


def _lse(x_RE: Tensor, prototypes_KE: Tensor, bias_K: Tensor, temp: float) -> Tensor:
    """log sum_k exp(<x_r, prototype_k> / temp - bias_k), (R,) float32."""
    (num_rows, width), num_prototypes = x_RE.shape, len(prototypes_KE)
    tile = LOGSUMEXP[x_RE.element_size()]
    lse_BR = bias_K.new_empty(_blocks(num_prototypes, tile), num_rows)
    _logsumexp[_grid(num_rows, num_prototypes, tile)](
        x_RE, prototypes_KE, bias_K, lse_BR, num_rows, num_prototypes, width, 1 / temp, **tile
    )
    return torch.logsumexp(lse_BR, dim=0)


def _split_product(dz_PK: Tensor, prototypes_KE: Tensor) -> Tensor:
    """dz @ prototypes, (P, E) float32; the sum over prototypes is split into parts, so that few rows fill a GPU."""
    (num_pairs, num_prototypes), width = dz_PK.shape, prototypes_KE.shape[1]
    blocks = triton.cdiv(num_pairs, 128) * triton.cdiv(width, 256)
    parts = math.gcd(num_prototypes, triton.next_power_of_2(triton.cdiv(WANTED_BLOCKS, blocks)))
    left_SPK = dz_PK.unflatten(1, (parts, -1)).transpose(0, 1)
    return torch.bmm(left_SPK, prototypes_KE.unflatten(0, (parts, -1))).sum(dim=0, dtype=torch.float32)


def _blocks(num_prototypes: int, tile: dict[str, int]) -> int:
    return triton.cdiv(num_prototypes, tile["BLOCK_K"])


def _grid(num_rows: int, num_prototypes: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(num_rows, tile["BLOCK_R"]) * _blocks(num_prototypes, tile),)
