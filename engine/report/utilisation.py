"""What share of the device a step uses: FLOPs that were needed, and that were computed, over what it could do.

    speed/tflops_per_rank   model FLOPs a second: forward and backward, each product once
    speed/mfu               the same as a share of the peak
    speed/hfu               with what checkpointing, gradient cache and losses compute again

    use = utilisation(training)
    str(use)                                 # 4,012.34 GFLOP a step and rank ...; MFU against ...
    use.values(seconds=0.5, counted={...})   # {"speed/tflops_per_rank": 7.9, "speed/mfu": 0.008, ...}

The peak is that of the precision of the blocks' products: FP8's with FP8 in the blocks, although other products stay
in bf16. On a CPU it is measured, before the first step and by all ranks at once, as they will share the machine; so is
the bandwidth of its memory, which no figure of the log needs, but the report's roofline does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs import RunConfig
from engine.training import Training
from profiling.cost.flops import StepFlops
from profiling.instruments.machine import MemoryBandwidth, PeakFlops, bandwidth, measured_bandwidth, measured_peak, peak


@dataclass(frozen=True)
class Utilisation:
    """Of one rank. `peak` is None on a device that nobody has stated one for."""

    precision: str  # of the blocks' products
    backend: str  # of attention, resolved
    flops: Callable[[Mapping[str, float]], StepFlops]  # Training.flops
    peak: PeakFlops | None
    bandwidth: MemoryBandwidth | None
    device_name: str

    def values(self, seconds: float, counted: Mapping[str, float]) -> dict[str, float]:
        """For a report on steps of so many seconds, of which the host counted so much."""
        step = self.flops(counted)
        found = {"speed/tflops_per_rank": step.model_flops / seconds / 1e12}
        if self.peak:
            possible = seconds * self.peak.flops_per_second
            found |= {"speed/mfu": step.model_flops / possible, "speed/hfu": step.hardware_flops / possible}
        return found

    def machine(self, world_size: int, is_compiled: bool) -> dict[str, Any]:
        """What a report must know of the machine: machine.json. Peaks are one rank's; None where nobody knows them."""
        peak, memory = self.peak, self.bandwidth
        return {
            "world_size": world_size,
            "device": self.device_name,
            "attention": self.backend,
            "is_compiled": is_compiled,
            "flops_per_second": peak and peak.flops_per_second,
            "flops_source": peak and peak.source,
            "bytes_per_second": memory and memory.bytes_per_second,
            "bytes_source": memory and memory.source,
        }

    def __str__(self) -> str:
        step = f"{self.flops({}).model_flops / 1e9:,.2f} GFLOP a step and rank by the config alone"
        if self.peak is None:
            return f"{step}; no MFU: no data sheet's {self.precision} peak is known for {self.device_name}"
        memory = f"; memory {self.bandwidth}" if self.bandwidth else ""
        return f"{step}; MFU against {self.peak}{memory}"


def utilisation(training: Training) -> Utilisation:
    """Of an assembled training; a CPU's peak and bandwidth are measured now, on the threads that torch has now."""
    config, device = training.config, training.device
    precision = _precision(config)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        best, memory = peak(name, precision), bandwidth(name)
    else:
        name, best, memory = device.type, measured_peak(config.optim.precision), measured_bandwidth()
    return Utilisation(precision, training.backend, training.flops, best, memory, name)


def _precision(config: RunConfig) -> str:
    return config.optim.precision if config.system.linear == "bf16" else "fp8"
