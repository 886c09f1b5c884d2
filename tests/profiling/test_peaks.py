"""Peaks: by the names that CUDA gives, dense, each with its source; a CPU's is measured."""

from __future__ import annotations

import pytest
import torch

from profiling.peaks import measured_peak, peak

pytestmark = pytest.mark.L0

# What torch.cuda.get_device_name says -> TFLOP/s in bf16 and FP8.
NAMES = {
    "NVIDIA A100-SXM4-80GB": (312, None),
    "NVIDIA A100 80GB PCIe": (312, None),
    "NVIDIA A800-SXM4-80GB": (312, None),
    "NVIDIA H100 80GB HBM3": (989.4, 1978.9),
    "NVIDIA H100 PCIe": (756.5, 1513),
    "NVIDIA H100 NVL": (835.5, 1670.5),
    "NVIDIA H800": (989.4, 1978.9),
    "NVIDIA H200": (989.4, 1978.9),
    "NVIDIA H200 NVL": (835.5, 1670.5),
    "NVIDIA GH200 480GB": (989.4, 1978.9),
    "NVIDIA B200": (2250, 4500),
    "NVIDIA L4": (121, 242.5),
    "NVIDIA L40": (181.05, 362),
    "NVIDIA L40S": (362.05, 733),
    "NVIDIA GeForce RTX 4090": (165.2, 330.3),
    "NVIDIA RTX A6000": (154.8, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_has_the_peak_of_its_data_sheet(name: str) -> None:
    for precision, expected in zip(("bf16", "fp8"), NAMES[name], strict=True):
        found = peak(name, precision)
        assert (found and found.flops_per_second) == (expected and expected * 1e12)
        assert found is None or found.source.startswith("NVIDIA ")
    assert peak(name, "fp32") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H20",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_is_no_other_has_no_peak(name: str) -> None:
    assert peak(name, "bf16") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the device in use, and says CPU")
def test_a_cpu_is_measured_and_says_how() -> None:
    found = measured_peak("fp32")
    assert found.flops_per_second > 1e9
    assert f"on {torch.get_num_threads()} thread" in found.source
    assert f"{found.flops_per_second / 1e12:,.4g} TFLOP/s (measured: 1024" in str(found)
