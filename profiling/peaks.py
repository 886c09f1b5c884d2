"""What a device can compute and move at best, and who says so: the denominator of MFU and HFU, and the roof.

    peak("NVIDIA H100 80GB HBM3", "bf16")     # Peak(989.4e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM")
    peak("NVIDIA A100-SXM4-80GB", "fp8")      # None: it has no FP8 products
    measured_peak("fp32")                     # Peak(1.4e11, "measured: ..."): a CPU, on the threads in use
    bandwidth("NVIDIA H100 80GB HBM3")        # Bandwidth(3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM")
    measured_bandwidth()                      # Bandwidth(1.1e10, "measured: ..."): a CPU's, with the ranks beside it

Dense products with float32 sums; data sheets print twice as much, "with sparsity". Where one prints that alone, half of
it stands here. A device that is not in the table has no peak, and nobody guesses one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from profiling.machine import TRIAD_MIB, matmul_peak, triad_peak

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUGH_SIZE = 1024  # of the square product that measures a CPU: larger ones take seconds and are no faster


@dataclass(frozen=True)
class Peak:
    """FLOP/s, and where the number comes from."""

    flops_per_second: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e12:,.4g} TFLOP/s ({self.source})"


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second between a device and its memory, and where the number comes from."""

    bytes_per_second: float
    source: str

    def __str__(self) -> str:
        return f"{self.bytes_per_second / 1e9:,.4g} GB/s ({self.source})"


@dataclass(frozen=True)
class Gpu:
    """`name` is a pattern for all that torch.cuda.get_device_name says after "NVIDIA "; TFLOP/s, dense; TB/s."""

    name: str
    bf16: float
    fp8: float | None
    memory: float
    source: str


_SAME = "differs in links and float64 alone"
_GPUS = (
    Gpu(r"A100-SXM.*80GB", 312, None, 2.039, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    Gpu(r"A100 80GB PCIe", 312, None, 1.935, "NVIDIA A100 Tensor Core GPU data sheet, PCIe"),
    Gpu(r"A100[- ].*40GB", 312, None, 1.555, "NVIDIA A100 Tensor Core GPU data sheet, 40 GB"),
    Gpu(r"A800-SXM4-80GB", 312, None, 2.039, f"NVIDIA A100 Tensor Core GPU data sheet, SXM; the A800 {_SAME}"),
    Gpu(r"A800 80GB PCIe", 312, None, 1.935, f"NVIDIA A100 Tensor Core GPU data sheet, PCIe; the A800 {_SAME}"),
    Gpu(r"A800[- ].*40GB.*", 312, None, 1.555, f"NVIDIA A100 Tensor Core GPU data sheet, 40 GB; the A800 {_SAME}"),
    Gpu(r"A30", 165, None, 0.933, "NVIDIA A30 Tensor Core GPU data sheet"),
    Gpu(r"A40", 149.7, None, 0.696, "NVIDIA A40 data sheet"),
    Gpu(r"A10", 125, None, 0.6, "NVIDIA A10 Tensor Core GPU data sheet"),
    Gpu(r"RTX A6000", 154.8, None, 0.768, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    Gpu(r"GeForce RTX 3090", 71, None, 0.936, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    Gpu(r"H100 PCIe", 756.5, 1513, 2, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    Gpu(r"H800 PCIe", 756.5, 1513, 2, f"NVIDIA H100 Tensor Core GPU data sheet, PCIe; the H800 {_SAME}"),
    Gpu(r"H100 NVL", 835.5, 1670.5, 3.9, "NVIDIA H100 Tensor Core GPU data sheet, NVL"),
    Gpu(r"H200 NVL", 835.5, 1670.5, 4.8, "NVIDIA H200 Tensor Core GPU data sheet, NVL"),
    Gpu(r"H100 80GB HBM3", 989.4, 1978.9, 3.35, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    Gpu(r"H800", 989.4, 1978.9, 3.35, f"NVIDIA H100 Tensor Core GPU data sheet, SXM; the H800 {_SAME}"),
    Gpu(r"H200", 989.4, 1978.9, 4.8, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    Gpu(r"GH200 480GB", 989.4, 1978.9, 4, "NVIDIA GH200 Grace Hopper Superchip data sheet, 96 GB of HBM3"),
    Gpu(r"GH200 144G HBM3e", 989.4, 1978.9, 4.9, "NVIDIA GH200 Grace Hopper Superchip data sheet, HBM3e"),
    Gpu(r"B200", 2250, 4500, 8, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    Gpu(r"GB200", 2500, 5000, 8, "NVIDIA GB200 NVL72 data sheet, one of 72 GPUs"),
    Gpu(r"L4", 121, 242.5, 0.3, "NVIDIA L4 Tensor Core GPU data sheet"),
    Gpu(r"L40", 181.05, 362, 0.864, "NVIDIA L40 data sheet"),
    Gpu(r"L40S", 362.05, 733, 0.864, "NVIDIA L40S data sheet"),
    Gpu(r"RTX 6000 Ada Generation", 364.2, 728.5, 0.96, "NVIDIA RTX 6000 Ada Generation data sheet"),
    Gpu(r"GeForce RTX 4090", 165.2, 330.3, 1.008, "NVIDIA Ada GPU architecture whitepaper"),
)


def peak(device: str, precision: str) -> Peak | None:
    """Of the GPU that CUDA calls `device`, for products in "bf16" or "fp8". None where no data sheet is known here:
    another name (a slice of a GPU has one), FP8 on a GPU without it, "fp32"."""
    gpu = _known(device)
    tera = {"bf16": gpu.bf16, "fp8": gpu.fp8}.get(precision) if gpu else None
    return Peak(tera * 1e12, gpu.source) if gpu and tera else None


def bandwidth(device: str) -> Bandwidth | None:
    """Of the memory of the GPU that CUDA calls `device`; None where no data sheet is known here."""
    gpu = _known(device)
    return Bandwidth(gpu.memory * 1e12, gpu.source) if gpu else None


def _known(device: str) -> Gpu | None:
    name = device.removeprefix("NVIDIA ")
    return next((gpu for gpu in _GPUS if re.fullmatch(gpu.name, name) and " MIG " not in name), None)


def measured_peak(precision: str) -> Peak:
    """Of this machine's CPU on as many threads as torch has now, "bf16" or "fp32"; takes a fraction of a second."""
    speed = matmul_peak(DTYPES[precision], (ROUGH_SIZE,))
    return Peak(speed, f"measured: {ROUGH_SIZE} x {ROUGH_SIZE} products in {precision} on {_threads()}")


def measured_bandwidth() -> Bandwidth:
    """Of this machine's memory as this process gets at it, on as many threads as torch has now: STREAM's triad
    (a = b + s c), the best of five. Ranks that call it together share the memory, as their steps do."""
    return Bandwidth(triad_peak(), f"measured: triad of three float32 arrays of {TRIAD_MIB} MiB on {_threads()}")


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread{'' if threads == 1 else 's'}"
