"""Benches of loss kernels, forward and backward, against the formula with its whole matrix.

`contrastive`: tiles against the whole matrix on vectors of 768, the joint space of the presets. The whole matrix is the
reference wherever it fits, on a GPU up to 32,768 pairs; peak memory shows what grows with the pairs and what with their
square. `prototypes`: the prototype loss with Sinkhorn-Knopp targets in chunks, on masked patches of width 256 as one
rank's step has them: 4,096 against 8,192 prototypes, on a GPU 8,192 against the 65,536 of the presets. `dense` is what
one writes without this engine: both matrices of logits, Sinkhorn on the teacher's, log-softmax of the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import sigmoid_contrast, sigmoid_reference, softmax_contrast, softmax_reference
from model.losses import targets
from model.losses.comm import Solo
from model.losses.ibot import ibot_loss
from model.losses.targets import Targets, sinkhorn
from profiling.benches.recorder import BenchRecorder
from profiling.instruments.machine import by_device, compared_dtypes, device

Loss = Callable[..., tuple[Tensor, Tensor]]
PAIRS = by_device(cpu=(512, 2048, 8192), cuda=(8192, 32_768, 131_072))
MAX_WHOLE = 32_768  # pairs: the matrix, its exponentials and both gradients take 16 GiB
WIDTH = 768
KINDS: dict[str, tuple[Loss, Loss]] = {
    "softmax": (softmax_reference, softmax_contrast),
    "sigmoid": (sigmoid_reference, sigmoid_contrast),
}


def bench_contrastive(recorder: BenchRecorder) -> None:
    """Contrastive losses in tiles against the whole matrix, by kind of loss and number of pairs."""
    for kind in KINDS:
        for pairs in PAIRS[:1] if recorder.is_dry else PAIRS:
            _measure_contrastive(kind, pairs, recorder)


def _measure_contrastive(kind: str, pairs: int, recorder: BenchRecorder) -> None:
    inputs = _inputs(kind, pairs)
    targets, tiled = KINDS[kind]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs)

    workload = f"{kind}, {pairs} pairs of {WIDTH}, float32, forward and backward"
    variants: dict[str, Callable[[], object]] = {"tiles": lambda: gradients(tiled(*inputs)[0])}
    if pairs > MAX_WHOLE:
        recorder.add(recorder.measure("contrastive", workload, variants, "tiles"))
        return
    for ours, theirs in zip(gradients(tiled(*inputs)[0]), gradients(targets(*inputs)[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    variants = {"whole matrix": lambda: gradients(targets(*inputs)[0]), **variants}
    recorder.add(recorder.measure("contrastive", workload, variants, "whole matrix"))


def _inputs(kind: str, pairs: int) -> tuple[Tensor, ...]:
    """Captions somewhat like their images; temperature and bias as at the start of a run."""
    image = torch.randn(pairs, WIDTH, device=device())
    text = image + torch.randn(pairs, WIDTH, device=device())
    scale, bias = (torch.tensor([value], device=device()) for value in (14.3, -10.0))
    inputs = (F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)
    return tuple(x.requires_grad_() for x in (inputs if kind == "sigmoid" else inputs[:3]))


ROWS, PROTOTYPES, PROTOTYPE_WIDTH = by_device(cpu=4096, cuda=8192), by_device(cpu=8192, cuda=65_536), 256
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
# Of a gradient, relative to its largest entry. In bf16 `dense` itself is off by 1.2e-2, its logits being bf16, and the
# chunks of a GPU, whose logits are float32, by 3e-3. In float32 1e-6 on a CPU; tensor cores round sums towards zero.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def bench_prototypes(recorder: BenchRecorder) -> None:
    """The prototype loss in chunks against whole matrices, by dtype of the features."""
    for dtype in compared_dtypes():
        _measure_prototypes(dtype, recorder)


def _measure_prototypes(dtype: torch.dtype, recorder: BenchRecorder) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_prototypes = (size // 8 if recorder.is_dry else size for size in (ROWS, PROTOTYPES))
    sizes = (num_rows, num_prototypes, num_rows, num_prototypes)
    units = [
        F.normalize(torch.randn(rows, PROTOTYPE_WIDTH, generator=generator), dim=1).to(device(), dtype)
        for rows in sizes
    ]
    student_ME, student_KE, teacher_ME, teacher_KE = units
    students = (student_ME.requires_grad_(), student_KE.requires_grad_())
    weight_M = torch.ones(num_rows, device=device())

    def in_chunks() -> tuple[Tensor, ...]:
        bias_K = sinkhorn(teacher_ME, teacher_KE, TEACHER_TEMP, Solo())
        targets = Targets(teacher_ME, teacher_KE, bias_K, TEACHER_TEMP)
        loss = ibot_loss(*students, targets, weight_M, STUDENT_TEMP, num_crops=num_rows)
        return torch.autograd.grad(loss, students)

    def written_out() -> tuple[Tensor, ...]:
        target_MK = targets.dense_sinkhorn(teacher_ME @ teacher_KE.T, TEACHER_TEMP, Solo())
        loss_M = targets.dense_cross_entropy(student_ME @ student_KE.T, target_MK, STUDENT_TEMP)
        return torch.autograd.grad((weight_M * loss_M).sum() / num_rows, students)

    for ours, theirs in zip(in_chunks(), written_out(), strict=True):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < BOUND[dtype], f"the variants differ by {error:.1e}"
    workload = (
        f"{num_rows} rows, {num_prototypes} prototypes of {PROTOTYPE_WIDTH}, {dtype}, Sinkhorn, forward and backward"
    )
    result = recorder.measure("prototypes", workload, {"dense": written_out, "chunks": in_chunks}, "dense")
    whole, part = result.rows
    assert whole.peak_mib is not None
    assert part.peak_mib is not None
    note = f"peak memory {whole.peak_mib:.1f} -> {part.peak_mib:.1f} MiB: {whole.peak_mib / part.peak_mib:.1f} x lower"
    recorder.add(replace(result, notes=(note,)))
