"""What Triton makes of every kernel for Hopper, compiled without a GPU: registers, spills, shared memory, instructions.

    python -m tests.kernels.test_triton_code            # the table of docs/decisions/triton_kernels.md

The kernels' own Python code runs, at the sizes of VTP-L, on tensors without memory; only the launch is left out. So
what is compiled is what a GPU would compile: the same specialisation, tiles and options.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MOST_REGISTERS, SHARED_BYTES = 255, 227 * 1024  # of a thread and of a block, compute capability 9.0
SMALLEST_SHARED_BYTES = 99 * 1024  # compute capability 8.6 and 8.9
COUNTED = {"wgmma": "wgmma.mma_async", "mma.sync": "mma.sync", "cp.async": "cp.async.cg", "exp2": "ex2.approx"}
# VTP-L with 32 ssl images a rank: its hidden patches; and its local crops, of which 8 share two targets.
PATCHES, CROPS = (2460, 1, 1), (32, 8, 2)
PROTOTYPES, WIDTH, CLIP_WIDTH = 65_536, 256, 768


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    kernel: str
    dtype: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]  # in PTX, by the names of COUNTED
    warnings: list[str]  # ptxas on what makes it slow
    seconds: float  # of a processor, to compile it


def prototype_loss(dtype: torch.dtype, groups: tuple[int, int, int], prototypes: int = PROTOTYPES) -> None:
    """Launches what Sinkhorn and the loss of these groups take: (groups, students, targets)."""
    from kernels.prototypes_triton import column_logsumexp, column_mass, loss_and_gradients

    num_groups, students, targets = groups
    student_GUE, teacher_GVE = (_meta(num_groups, n, WIDTH, dtype=dtype) for n in (students, targets))
    student_KE, teacher_KE = (_meta(prototypes, WIDTH, dtype=dtype) for _ in range(2))
    bias_K, weight_GU = _meta(prototypes), _meta(num_groups, students)
    column_logsumexp(teacher_GVE.flatten(0, 1), teacher_KE, 0.05)
    column_mass(teacher_GVE.flatten(0, 1), teacher_KE, 0.05, bias_K)
    loss_and_gradients(student_GUE, student_KE, teacher_GVE, teacher_KE, bias_K, weight_GU, 0.1, 0.05, 256 * 2**20)


def contrastive_losses(own: int, of_all_ranks: int) -> None:
    """Launches both contrastive losses, forward and backward."""
    from kernels.contrastive import sigmoid_contrast, softmax_contrast

    image_BE, text_AE = (_meta(n, CLIP_WIDTH).requires_grad_() for n in (own, of_all_ranks))
    for loss in (softmax_contrast, sigmoid_contrast):
        scalars = [_meta(1).requires_grad_() for _ in range(2 if loss is sigmoid_contrast else 1)]
        loss(image_BE, text_AE, *scalars, backend="triton")[0].backward()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compiled_code(launch: Callable[[], None], dtype: str, capability: int = 90) -> list[Code]:
    """What `launch` compiles, one entry a variant. Not where Triton interprets."""
    with _without_a_gpu(capability) as variants:
        launch()
    return [_code(*variant, dtype, capability) for variant in variants.values()]


class _Driver:
    """Triton's view of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # a key of Triton's caches: each capability has its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def _without_a_gpu(capability: int) -> Iterator[dict[int, tuple[Any, tuple[int, ...], float]]]:
    """Launches compile and do nothing else; yields what they compiled, with the grid and the seconds."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    variants: dict[int, tuple[Any, tuple[int, ...], float]] = {}

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        before = _processor_seconds()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        variants.setdefault(id(kernel), (kernel, grid, _processor_seconds() - before))
        return kernel

    run = JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(capability))
        patch.setattr(JITFunction, "run", compile_only)
        yield variants


def _processor_seconds() -> float:
    return sum(os.times()[:4])  # ptxas is a child


def _code(kernel: Any, grid: tuple[int, ...], seconds: float, dtype: str, capability: int) -> Code:
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    arch = f"sm_{capability}{'a' if capability == 90 else ''}"
    done = subprocess.run(
        [ptxas, "-v", f"--gpu-name={arch}", "-", "-o", os.devnull],
        input=kernel.asm["ptx"],
        capture_output=True,
        text=True,
        check=True,
    )
    counts = {name: kernel.asm["ptx"].count(text) for name, text in COUNTED.items()}
    return Code(
        kernel.metadata.name, dtype, grid, kernel.metadata.num_warps, kernel.metadata.num_stages,
        int(re.findall(r"Used (\d+) registers", done.stderr)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        kernel.metadata.shared, counts,
        [line for line in done.stderr.splitlines() if "Performance Loss" in line], round(seconds, 1),
    )  # fmt: skip


def vtp_l(capability: int = 90) -> list[Code]:
    """Every kernel at the sizes of VTP-L; the sizes of a batch must not make a second variant of any."""

    def contrastive() -> None:
        contrastive_losses(128, 16_384)
        contrastive_losses(8192, 8192)

    def prototypes(dtype: torch.dtype) -> None:
        for groups in (PATCHES, CROPS, (601, 1, 1)):
            prototype_loss(dtype, groups)

    return [
        *compiled_code(lambda: prototypes(torch.bfloat16), "bf16", capability),
        *compiled_code(lambda: prototypes(torch.float32), "fp32", capability),
        *compiled_code(contrastive, "fp32", capability),
    ]


@pytest.fixture(scope="module")
def hopper() -> list[Code]:
    return _in_a_process(90)


def print_json(capability: int) -> None:
    """One line: every kernel's Code."""
    print(json.dumps([asdict(code) for code in vtp_l(capability)]))


def _in_a_process(capability: int) -> list[Code]:
    """Of its own, and no fork: what is imported may have brought Triton along, and then it interprets."""
    command = [sys.executable, "-c", f"from {__name__} import print_json; print_json({capability})"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Code(**code) for code in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.L0
def test_every_kernel_fits_hopper_and_spills_nothing(hopper: list[Code]) -> None:
    for code in hopper:
        assert not code.spilled_bytes, code
        assert code.registers < MOST_REGISTERS, code
        assert code.shared_bytes <= SHARED_BYTES, code
        assert not code.warnings, code


@pytest.mark.L0
def test_products_run_on_tensor_cores_of_hopper_with_asynchronous_copies(hopper: list[Code]) -> None:
    products = [code for code in hopper if code.kernel in ("_logsumexp", "_differences")]
    assert len(products) == 4
    for code in products:
        assert code.instructions["wgmma"], code
        assert not code.instructions["mma.sync"], code
        assert code.instructions["cp.async"], code
        assert code.stages >= 3, code


@pytest.mark.L0
def test_two_blocks_of_a_bf16_prototype_kernel_fit_on_a_multiprocessor(hopper: list[Code]) -> None:
    """So that one computes exponentials while the other multiplies."""
    for code in hopper:
        if code.dtype == "bf16":
            assert 2 * code.warps * 32 * code.registers <= 65_536, code
            assert 2 * code.shared_bytes <= SHARED_BYTES, code


@pytest.mark.L0
def test_the_sizes_of_a_batch_compile_no_kernel_anew(hopper: list[Code]) -> None:
    names = [(code.kernel, code.dtype) for code in hopper]
    assert len(set(names)) == len(names), names
    assert len(names) == 8


@pytest.mark.L1
def test_every_kernel_fits_the_shared_memory_of_small_gpus() -> None:
    for code in _in_a_process(89):
        assert code.shared_bytes <= SMALLEST_SHARED_BYTES, code
        assert not code.instructions["wgmma"], code


def main() -> None:
    """Prints the table."""
    print("kernel dtype | grid | warps stages | registers spilled shared KiB |", *COUNTED, "| seconds")
    for code in vtp_l():
        print(
            f"{code.kernel} {code.dtype} | {code.grid} | {code.warps} {code.stages} | {code.registers}",
            f"{code.spilled_bytes} {code.shared_bytes / 1024:.0f} |",
            *code.instructions.values(), f"| {code.seconds}", *code.warnings,
        )  # fmt: skip


if __name__ == "__main__":
    main()
