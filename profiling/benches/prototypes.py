"""The prototype loss, Sinkhorn-Knopp targets included, forward and backward: in chunks against whole matrices.

Hidden patches against prototypes of width 256, as one rank's step has them: 4,096 against 8,192, on a GPU 8,192 against
the 65,536 of the presets. `dense` is what one writes
without this engine: both matrices of logits, Sinkhorn on the teacher's, log-softmax of the student's, autograd.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.objectives import dense
from model.objectives.comm import Solo
from model.objectives.masked_patch import masked_patch_loss
from model.objectives.targets import Targets, sinkhorn
from profiling.machine import compared_dtypes, device, sized
from profiling.measurement import Recorder

ROWS, PROTOTYPES, WIDTH = sized(cpu=4096, cuda=8192), sized(cpu=8192, cuda=65_536), 256
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
# Of a gradient, relative to its largest entry. In bf16 `dense` itself is off by 1.2e-2, its logits being bf16, and the
# chunks of a GPU, whose logits are float32, by 3e-3. In float32 1e-6 on a CPU; tensor cores round sums towards zero.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def run(recorder: Recorder) -> None:
    """One measurement a dtype of the features."""
    for dtype in compared_dtypes():
        _measure(dtype, recorder)


def _measure(dtype: torch.dtype, recorder: Recorder) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_prototypes = (size // 8 if recorder.is_dry else size for size in (ROWS, PROTOTYPES))
    sizes = (num_rows, num_prototypes, num_rows, num_prototypes)
    units = [F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1).to(device(), dtype) for rows in sizes]
    student_ME, student_KE, teacher_ME, teacher_KE = units
    learners = (student_ME.requires_grad_(), student_KE.requires_grad_())
    weight_M = torch.ones(num_rows, device=device())

    def in_chunks() -> tuple[Tensor, ...]:
        bias_K = sinkhorn(teacher_ME, teacher_KE, TEACHER_TEMP, Solo())
        targets = Targets(teacher_ME, teacher_KE, bias_K, TEACHER_TEMP)
        loss = masked_patch_loss(*learners, targets, weight_M, STUDENT_TEMP, num_crops=num_rows)
        return torch.autograd.grad(loss, learners)

    def written_out() -> tuple[Tensor, ...]:
        target_MK = dense.sinkhorn(teacher_ME @ teacher_KE.T, TEACHER_TEMP, Solo())
        loss_M = dense.cross_entropy(student_ME @ student_KE.T, target_MK, STUDENT_TEMP)
        return torch.autograd.grad((weight_M * loss_M).sum() / num_rows, learners)

    for ours, theirs in zip(in_chunks(), written_out(), strict=True):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < BOUND[dtype], f"the variants differ by {error:.1e}"
    workload = f"{num_rows} rows, {num_prototypes} prototypes of {WIDTH}, {dtype}, Sinkhorn, forward and backward"
    found = recorder.measure("prototypes", workload, {"dense": written_out, "chunks": in_chunks}, "dense")
    whole, part = found.rows
    assert whole.peak_mib is not None
    assert part.peak_mib is not None
    note = f"peak memory {whole.peak_mib:.1f} -> {part.peak_mib:.1f} MiB: {whole.peak_mib / part.peak_mib:.1f} x lower"
    recorder.add(replace(found, notes=(note,)))
