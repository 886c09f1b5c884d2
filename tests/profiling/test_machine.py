"""Timing in turns with paired ratios; peaks by data sheet or measured, each with its source."""

from __future__ import annotations

import pytest
import torch

from profiling.instruments import machine
from profiling.instruments.machine import (
    PairedTimes,
    VariantTimes,
    bandwidth,
    measured_bandwidth,
    measured_peak,
    peak,
    time_variants,
)

pytestmark = pytest.mark.L0


def test_variants_take_turns_and_warm_up_first() -> None:
    order: list[str] = []
    times = time_variants({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warmups=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times[name].seconds) for name in times} == {"a": 3, "b": 3, "c": 3}


def test_calls_are_numbered_and_the_last_warm_up_call_is_round_0() -> None:
    seen: list[tuple[str, int]] = []
    time_variants(
        {"a": int, "b": int}, rounds=1, warmups=2, on_timing=lambda name, number, _: seen.append((name, number))
    )
    assert seen == [("a", -1), ("a", 0), ("b", -1), ("b", 0), ("a", 1), ("b", 1)]


def test_what_a_variant_takes_is_what_the_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    times = time_variants({"slow": lambda: work(3.0), "fast": lambda: work(1.5)}, rounds=5)
    assert times["slow"].seconds == (3.0,) * 5
    assert times["fast"].median == 1.5
    assert times.ratio("slow", "fast") == 2.0
    assert times["slow"].spread == 0.0


def test_a_ratio_is_the_median_of_quotients_of_one_round() -> None:
    times = PairedTimes(a=VariantTimes((2.0, 40.0, 2.0)), b=VariantTimes((1.0, 20.0, 0.5)))
    assert times.ratio("a", "b") == 2.0
    assert times["a"].median / times["b"].median == 2.0
    assert times["b"].spread == 0.0, "three rounds have no quartiles"
    assert VariantTimes((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(0.5)


# What torch.cuda.get_device_name says -> TFLOP/s in bf16 and FP8, TB/s.
NAMES = {
    "NVIDIA A100-SXM4-80GB": (312, None, 2.039),
    "NVIDIA A100-SXM4-40GB": (312, None, 1.555),
    "NVIDIA A100-PCIE-40GB": (312, None, 1.555),
    "NVIDIA A100 80GB PCIe": (312, None, 1.935),
    "NVIDIA A800-SXM4-80GB": (312, None, 2.039),
    "NVIDIA H100 80GB HBM3": (989.4, 1978.9, 3.35),
    "NVIDIA H100 PCIe": (756.5, 1513, 2),
    "NVIDIA H100 NVL": (835.5, 1670.5, 3.9),
    "NVIDIA H800": (989.4, 1978.9, 3.35),
    "NVIDIA H200": (989.4, 1978.9, 4.8),
    "NVIDIA H200 NVL": (835.5, 1670.5, 4.8),
    "NVIDIA GH200 480GB": (989.4, 1978.9, 4),
    "NVIDIA B200": (2250, 4500, 8),
    "NVIDIA L4": (121, 242.5, 0.3),
    "NVIDIA L40": (181.05, 362, 0.864),
    "NVIDIA L40S": (362.05, 733, 0.864),
    "NVIDIA GeForce RTX 4090": (165.2, 330.3, 1.008),
    "NVIDIA RTX A6000": (154.8, None, 0.768),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_has_the_peak_of_its_data_sheet(name: str) -> None:
    memory = bandwidth(name)
    assert memory is not None
    assert memory.bytes_per_second == NAMES[name][2] * 1e12
    assert memory.source.startswith("NVIDIA ")
    for precision, expected in zip(("bf16", "fp8"), NAMES[name][:2], strict=True):
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
        "NVIDIA A100-SXM-64GB",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_is_no_other_has_no_peak(name: str) -> None:
    assert peak(name, "bf16") is None
    assert bandwidth(name) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the device in use, and says CPU")
def test_a_cpu_is_measured_and_says_how() -> None:
    found = measured_peak("fp32")
    assert found.flops_per_second > 1e9
    assert f"on {torch.get_num_threads()} thread" in found.source
    assert f"{found.flops_per_second / 1e12:,.4g} TFLOP/s (measured: 1024" in str(found)
    memory = measured_bandwidth()
    assert memory.bytes_per_second > 1e8
    assert f"on {torch.get_num_threads()} thread" in memory.source
    assert f"{memory.bytes_per_second / 1e9:,.4g} GB/s (measured: triad" in str(memory)
