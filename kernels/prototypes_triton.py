"""The prototype cross-entropy in Triton: logits live in registers, tile by tile, and are never written to memory.

Same contract as kernels.prototypes.chunked. Work is laid out in pairs, one student row against one target row; of a
group of U students and V targets pair p is student p // V and target (p // (U*V)) * V + p % V. Three kernels, each
computing a tile of both logits by `_tiles`:

    _statistics       a block of pairs over a share of the prototypes: log-sum-exp of the student's and of the
                      teacher's logits, both online, and the target's mean of the student's logits
    _grad_students    a block of pairs over a share of the prototypes:  sum_k (p - q)_k prototype_k
    _grad_prototypes  a block of prototypes over all pairs:             sum_r (p - q)_r weight_r student_r

A share (SPLIT) of the prototypes makes blocks enough for a GPU of few pairs; shares are joined by plain PyTorch.

    loss, grad_student_GUE, grad_KE = loss_and_gradients(student_GUE, student_KE, teacher_GVE, teacher_KE, ...)
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments have Triton's types, decided at each call)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WANTED_BLOCKS = 512  # a few for every multiprocessor of the largest GPUs
STUDENT_BYTES = 32 * 2**10  # of one block's student rows; all it reads is three times as much: see `options`


@triton.jit
def _rows(pointer, rows, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Whole rows of an (R, E) matrix; zeros beyond it."""
    columns = tl.arange(0, BLOCK_E)
    inside = (rows < num_rows)[:, None] & (columns < E)[None, :]
    return tl.load(pointer + rows[:, None].to(tl.int64) * E + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _pair_rows(
    student, teacher, pairs, num_pairs, U: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Features of the pairs' students and targets."""
    x_PE = _rows(student, pairs // V, num_pairs // V, E, BLOCK_E)
    t_PE = _rows(teacher, (pairs // (U * V)) * V + pairs % V, num_pairs // U, E, BLOCK_E)
    return x_PE, t_PE


@triton.jit
def _tiles(x_PE, t_PE, w_KE, v_KE, bias, prototypes, K, inverse_student_temp, inverse_teacher_temp):
    """(P, K) tiles of student and teacher logits; prototypes beyond K are infinitely unlikely."""
    inside = (prototypes < K)[None, :]
    bias_K = tl.load(bias + prototypes, mask=prototypes < K, other=0.0)
    z_PK = tl.dot(x_PE, tl.trans(w_KE), input_precision="ieee") * inverse_student_temp
    s_PK = tl.dot(t_PE, tl.trans(v_KE), input_precision="ieee") * inverse_teacher_temp - bias_K[None, :]
    return tl.where(inside, z_PK, -float("inf")), tl.where(inside, s_PK, -float("inf"))


@triton.jit
def _statistics(
    student, student_prototypes, teacher, teacher_prototypes, bias, student_lse, teacher_lse, agreement,
    num_pairs, K, inverse_student_temp, inverse_teacher_temp, split,
    U: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of pairs, shares of `split` prototypes); writes three (shares, P) arrays."""
    pairs = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_PE, t_PE = _pair_rows(student, teacher, pairs, num_pairs, U, V, E, BLOCK_E)
    z_top, z_sum = tl.full((BLOCK_P,), -float("inf"), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    s_top, s_sum = tl.full((BLOCK_P,), -float("inf"), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    weighted = tl.zeros((BLOCK_P,), tl.float32)
    first = tl.program_id(1) * split
    for start in range(first, tl.minimum(first + split, K), BLOCK_K):
        prototypes = start + tl.arange(0, BLOCK_K)
        w_KE = _rows(student_prototypes, prototypes, K, E, BLOCK_E)
        v_KE = _rows(teacher_prototypes, prototypes, K, E, BLOCK_E)
        z_PK, s_PK = _tiles(x_PE, t_PE, w_KE, v_KE, bias, prototypes, K, inverse_student_temp, inverse_teacher_temp)
        top = tl.maximum(z_top, tl.max(z_PK, 1))
        z_sum = z_sum * tl.exp(z_top - top) + tl.sum(tl.exp(z_PK - top[:, None]), 1)
        z_top = top
        top = tl.maximum(s_top, tl.max(s_PK, 1))
        shrink, e_PK = tl.exp(s_top - top), tl.exp(s_PK - top[:, None])
        s_sum = s_sum * shrink + tl.sum(e_PK, 1)
        weighted = weighted * shrink + tl.sum(e_PK * tl.where((prototypes < K)[None, :], z_PK, 0.0), 1)
        s_top = top
    to = tl.program_id(1) * num_pairs + pairs
    tl.store(student_lse + to, z_top + tl.log(z_sum), mask=pairs < num_pairs)
    tl.store(teacher_lse + to, s_top + tl.log(s_sum), mask=pairs < num_pairs)
    tl.store(agreement + to, weighted / s_sum, mask=pairs < num_pairs)


@triton.jit
def _difference(z_PK, s_PK, student_lse, teacher_lse, pairs, num_pairs):
    """p - q of a tile; 0 for pairs that are none."""
    inside = pairs < num_pairs
    z_lse = tl.load(student_lse + pairs, mask=inside, other=0.0)
    s_lse = tl.load(teacher_lse + pairs, mask=inside, other=0.0)
    return tl.where(inside[:, None], tl.exp(z_PK - z_lse[:, None]) - tl.exp(s_PK - s_lse[:, None]), 0.0)


@triton.jit
def _grad_students(
    student, student_prototypes, teacher, teacher_prototypes, bias, student_lse, teacher_lse, grad,
    num_pairs, K, inverse_student_temp, inverse_teacher_temp, split,
    U: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of pairs, shares of `split` prototypes); writes (shares, P, E) float32, not weighted."""
    pairs = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_PE, t_PE = _pair_rows(student, teacher, pairs, num_pairs, U, V, E, BLOCK_E)
    grad_PE = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    first = tl.program_id(1) * split
    for start in range(first, tl.minimum(first + split, K), BLOCK_K):
        prototypes = start + tl.arange(0, BLOCK_K)
        w_KE = _rows(student_prototypes, prototypes, K, E, BLOCK_E)
        v_KE = _rows(teacher_prototypes, prototypes, K, E, BLOCK_E)
        z_PK, s_PK = _tiles(x_PE, t_PE, w_KE, v_KE, bias, prototypes, K, inverse_student_temp, inverse_teacher_temp)
        dz_PK = _difference(z_PK, s_PK, student_lse, teacher_lse, pairs, num_pairs)
        grad_PE += tl.dot(dz_PK.to(w_KE.dtype), w_KE, input_precision="ieee")
    columns = tl.arange(0, BLOCK_E)
    to = (tl.program_id(1) * num_pairs + pairs).to(tl.int64)[:, None] * E + columns[None, :]
    tl.store(grad + to, grad_PE, mask=(pairs < num_pairs)[:, None] & (columns < E)[None, :])


@triton.jit
def _grad_prototypes(
    student, student_prototypes, teacher, teacher_prototypes, bias, student_lse, teacher_lse, scale, grad,
    num_pairs, K, inverse_student_temp, inverse_teacher_temp,
    U: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of prototypes,); writes (K, E) in the dtype of `grad`."""
    prototypes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    w_KE = _rows(student_prototypes, prototypes, K, E, BLOCK_E)
    v_KE = _rows(teacher_prototypes, prototypes, K, E, BLOCK_E)
    grad_KE = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for start in range(0, num_pairs, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        x_PE, t_PE = _pair_rows(student, teacher, pairs, num_pairs, U, V, E, BLOCK_E)
        z_PK, s_PK = _tiles(x_PE, t_PE, w_KE, v_KE, bias, prototypes, K, inverse_student_temp, inverse_teacher_temp)
        dz_PK = _difference(z_PK, s_PK, student_lse, teacher_lse, pairs, num_pairs)
        scale_P = tl.load(scale + pairs, mask=pairs < num_pairs, other=0.0)
        scaled_PE = (x_PE.to(tl.float32) * scale_P[:, None]).to(x_PE.dtype)
        grad_KE += tl.dot(tl.trans(dz_PK).to(x_PE.dtype), scaled_PE, input_precision="ieee")
    columns = tl.arange(0, BLOCK_E)
    to = prototypes[:, None].to(tl.int64) * E + columns[None, :]
    tl.store(grad + to, grad_KE.to(grad.dtype.element_ty), mask=(prototypes < K)[:, None] & (columns < E)[None, :])


def loss_and_gradients(
    student_GUE: Tensor,
    student_KE: Tensor,
    teacher_GVE: Tensor,
    teacher_KE: Tensor,
    bias_K: Tensor,
    weight_GU: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () float32 and its gradients of `student_GUE` and `student_KE`. Holds (shares, pairs, E) float32 besides."""
    (num_groups, num_students, width), num_targets = student_GUE.shape, teacher_GVE.shape[1]
    num_pairs, num_prototypes = num_groups * num_students * num_targets, student_KE.shape[0]
    if num_pairs == 0:
        return bias_K.new_zeros(()), torch.zeros_like(student_GUE), torch.zeros_like(student_KE)
    launch = {"U": num_students, "V": num_targets, **options(width, student_KE.element_size())}
    pair_blocks, num_splits, split = _shares(num_pairs, num_prototypes, launch)
    features = [t.contiguous() for t in (student_GUE, student_KE, teacher_GVE, teacher_KE, bias_K)]
    sizes = (num_pairs, num_prototypes, 1 / student_temp, 1 / teacher_temp)

    shares = bias_K.new_empty(3, num_splits, num_pairs)
    _statistics[pair_blocks, num_splits](*features, *shares.unbind(), *sizes, split, **launch)
    student_lse_P, teacher_lse_P = torch.logsumexp(shares[:2], dim=1).unbind()
    agreement_P = ((shares[1] - teacher_lse_P).exp() * shares[2]).sum(dim=0)
    weight_P = (weight_GU / num_targets).flatten().repeat_interleave(num_targets)
    loss = (weight_P * (student_lse_P - agreement_P)).sum()

    scale_P = weight_P / student_temp
    statistics = (student_lse_P.contiguous(), teacher_lse_P.contiguous())
    partial = bias_K.new_empty(num_splits, num_pairs, width)
    _grad_students[pair_blocks, num_splits](*features, *statistics, partial, *sizes, split, **launch)
    grad_PE = partial.sum(dim=0) * scale_P[:, None]
    grad_student_GUE = grad_PE.view(num_groups, num_students, num_targets, width).sum(dim=2).to(student_GUE.dtype)
    grad_KE = torch.empty_like(features[1])
    _grad_prototypes[(triton.cdiv(num_prototypes, launch["BLOCK_K"]),)](
        *features, *statistics, scale_P, grad_KE, *sizes, **launch
    )
    return loss, grad_student_GUE, grad_KE


def options(width: int, itemsize: int) -> dict[str, Any]:
    """Tile sizes and compiler options of all kernels for features of `width` numbers of `itemsize` bytes.

    A block keeps whole rows in shared memory: BLOCK_P students and as many targets, BLOCK_K prototypes of either side,
    96 KiB at width 256 in bf16 and in fp32, within the 99 KiB of the smallest GPUs that have bf16.
    """
    padded = max(16, triton.next_power_of_2(width))
    block = min(64, max(16, STUDENT_BYTES // (padded * itemsize)))
    return {
        "E": width, "BLOCK_E": padded, "BLOCK_P": block, "BLOCK_K": max(16, block // 2),
        "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def _shares(num_pairs: int, num_prototypes: int, launch: dict[str, Any]) -> tuple[int, int, int]:
    """Blocks of pairs, shares of the prototypes, prototypes of a share (a multiple of a tile's)."""
    pair_blocks = triton.cdiv(num_pairs, launch["BLOCK_P"])
    tiles = triton.cdiv(num_prototypes, launch["BLOCK_K"])
    tiles_of_share = triton.cdiv(tiles, max(1, WANTED_BLOCKS // pair_blocks))
    return pair_blocks, triton.cdiv(tiles, tiles_of_share), tiles_of_share * launch["BLOCK_K"]
