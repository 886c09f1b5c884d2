"""The Triton kernels against the oracle: in Triton's interpreter anywhere, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from kernels import prototypes
from tests.kernels.test_prototypes import Case, draw, error

ROOT = Path(__file__).resolve().parents[2]
# (groups, students, targets, prototypes, width): one tile, several, ragged ends, groups, one pair.
CASES = [(64, 1, 1, 64, 16), (150, 1, 1, 150, 80), (9, 3, 2, 65, 16), (1, 1, 1, 3, 32), (0, 1, 1, 40, 16)]


def worst_error(case: Case, dtype: torch.dtype = torch.float32, chunk_bytes: int = 256 * 2**20) -> float:
    """Of loss and gradients, the features in `dtype`; the oracle takes their values in float32."""
    from kernels.prototypes_triton import loss_and_gradients

    inputs = [x.detach() if torch.is_tensor(x) else x for x in case.inputs()]
    narrow = [x.to(dtype) if torch.is_tensor(x) else x for x in inputs[:4]] + inputs[4:]
    found = loss_and_gradients(*narrow, chunk_bytes)
    exact = [x.float() if torch.is_tensor(x) else x for x in narrow]
    learners = [x.requires_grad_() for x in exact[:2]]
    loss = prototypes.prototype_cross_entropy_reference(*exact)
    expected = (loss.detach(), *torch.autograd.grad(loss, learners))
    return max(error(ours.float(), theirs) for ours, theirs in zip(found, expected, strict=True))


def column_error(case: Case, dtype: torch.dtype = torch.float32) -> float:
    """Of Sinkhorn's passes over the teacher's rows."""
    from kernels.prototypes_triton import column_logsumexp, column_mass

    teacher_RE, teacher_KE = case.teacher_GVE[:, 0].to(dtype), case.teacher_KE.detach().to(dtype)
    z_RK = teacher_RE.float() @ teacher_KE.float().T / case.teacher_temp
    found = column_logsumexp(teacher_RE, teacher_KE, case.teacher_temp)
    mass_K = column_mass(teacher_RE, teacher_KE, case.teacher_temp, case.bias_K)
    expected_mass_K = torch.softmax(z_RK - case.bias_K, dim=1).sum(dim=0)
    lowest_K = torch.full_like(mass_K, torch.finfo(torch.float32).min)
    return max(error(found, z_RK.logsumexp(dim=0) if len(z_RK) else lowest_K), error(mass_K, expected_mass_K))


@pytest.mark.L0
def test_kernels_equal_the_oracle_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.kernels.test_prototypes_triton"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    errors = [float(line) for line in run.stdout.split()]
    assert len(errors) == 6 * len(CASES)
    # Measured worst 1.7e-6, relative to the largest entry; a tile left out or counted twice is off by percents.
    assert max(errors[: 4 * len(CASES)]) < 1e-5, errors
    # Half precision, which the interpreter has and bf16 it has not: p - q is rounded to 11 bits, worst 6e-4.
    assert max(errors[4 * len(CASES) :]) < 2e-3, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for and runs on a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_the_oracle_on_the_gpu(dtype: torch.dtype) -> None:
    random = Random(0)
    drawn = [
        (random.randint(1, 600), *sizes, random.randint(1, 5000), random.randint(1, 256))
        for sizes in ((1, 1), (8, 2), (3, 2))
    ]
    # 65,536 prototypes and 2,460 rows are VTP-L's on a rank, in two chunks.
    for shape in [*CASES, (2460, 1, 1, 65_536, 256), (64, 8, 2, 4096, 256), *drawn]:
        case = draw(*shape)
        on_gpu = Case(*[x.detach().cuda() if torch.is_tensor(x) else x for x in case.inputs()])
        # fp32 logits are three TF32 products, 2^-21 of a logit; bf16 rounds p - q once and its products.
        assert worst_error(on_gpu, dtype) < (1e-4 if dtype == torch.float32 else 2e-2)
        assert column_error(on_gpu, dtype) < 1e-4  # of the same rounded inputs


if __name__ == "__main__":
    for shape in CASES:
        print(column_error(draw(*shape)))
        print(column_error(draw(*shape), torch.float16))
    for dtype in (torch.float32, torch.float16):
        for num_bytes in (2**20, 9000):  # differences in one chunk and in several
            for shape in CASES:
                print(worst_error(draw(*shape), dtype, num_bytes))
