"""What a device can compute at best, and who says so: the denominator of MFU and HFU.

    peak("NVIDIA H100 80GB HBM3", "bf16")     # Peak(989.4e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM")
    peak("NVIDIA A100-SXM4-80GB", "fp8")      # None: it has no FP8 products
    measured_peak("fp32")                     # Peak(1.4e11, "measured: ..."): a CPU, on the threads in use

Dense products with float32 sums; data sheets print twice as much, "with sparsity". Where one prints that alone, half of
it stands here. A device that is not in the table has no peak, and nobody guesses one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from profiling.machine import matmul_peak

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
class Gpu:
    """`name` is a pattern for all that torch.cuda.get_device_name says after "NVIDIA "; TFLOP/s, dense."""

    name: str
    bf16: float
    fp8: float | None
    source: str


_SAME = "differs in links and float64 alone"
_GPUS = (
    Gpu(r"A100[- ].*", 312, None, "NVIDIA A100 Tensor Core GPU data sheet"),
    Gpu(r"A800[- ].*", 312, None, f"NVIDIA A100 Tensor Core GPU data sheet; the A800 {_SAME}"),
    Gpu(r"A30", 165, None, "NVIDIA A30 Tensor Core GPU data sheet"),
    Gpu(r"A40", 149.7, None, "NVIDIA A40 data sheet"),
    Gpu(r"A10", 125, None, "NVIDIA A10 Tensor Core GPU data sheet"),
    Gpu(r"RTX A6000", 154.8, None, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    Gpu(r"GeForce RTX 3090", 71, None, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    Gpu(r"H100 PCIe", 756.5, 1513, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    Gpu(r"H800 PCIe", 756.5, 1513, f"NVIDIA H100 Tensor Core GPU data sheet, PCIe; the H800 {_SAME}"),
    Gpu(r"(H100|H200) NVL", 835.5, 1670.5, "NVIDIA H100 and H200 Tensor Core GPU data sheets, NVL"),
    Gpu(r"H100 80GB HBM3", 989.4, 1978.9, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    Gpu(r"H800", 989.4, 1978.9, f"NVIDIA H100 Tensor Core GPU data sheet, SXM; the H800 {_SAME}"),
    Gpu(r"H200", 989.4, 1978.9, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    Gpu(r"GH200 .*", 989.4, 1978.9, "NVIDIA GH200 Grace Hopper Superchip data sheet"),
    Gpu(r"B200", 2250, 4500, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    Gpu(r"GB200", 2500, 5000, "NVIDIA GB200 NVL72 data sheet, one of 72 GPUs"),
    Gpu(r"L4", 121, 242.5, "NVIDIA L4 Tensor Core GPU data sheet"),
    Gpu(r"L40", 181.05, 362, "NVIDIA L40 data sheet"),
    Gpu(r"L40S", 362.05, 733, "NVIDIA L40S data sheet"),
    Gpu(r"RTX 6000 Ada Generation", 364.2, 728.5, "NVIDIA RTX 6000 Ada Generation data sheet"),
    Gpu(r"GeForce RTX 4090", 165.2, 330.3, "NVIDIA Ada GPU architecture whitepaper"),
)


def peak(device: str, precision: str) -> Peak | None:
    """Of the GPU that CUDA calls `device`, for products in "bf16" or "fp8". None where no data sheet is known here:
    another name (a slice of a GPU has one), FP8 on a GPU without it, "fp32"."""
    name = device.removeprefix("NVIDIA ")
    gpu = next((gpu for gpu in _GPUS if re.fullmatch(gpu.name, name) and " MIG " not in name), None)
    tera = {"bf16": gpu.bf16, "fp8": gpu.fp8}.get(precision) if gpu else None
    return Peak(tera * 1e12, gpu.source) if gpu and tera else None


def measured_peak(precision: str) -> Peak:
    """Of this machine's CPU on as many threads as torch has now, "bf16" or "fp32"; takes a fraction of a second."""
    speed = matmul_peak(DTYPES[precision], (ROUGH_SIZE,))
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return Peak(speed, f"measured: {ROUGH_SIZE} x {ROUGH_SIZE} products in {precision} on {threads} thread{plural}")
