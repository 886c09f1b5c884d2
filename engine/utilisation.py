"""What share of the device a step uses: FLOPs that were needed, and that were computed, over what it could do.

    speed/tflops_per_rank   model FLOPs a second: forward and backward, each product once
    speed/mfu               the same as a share of the peak
    speed/hfu               with what checkpointing, gradient cache and losses compute again

    use = utilisation(config, rows, backend="sdpa", device=torch.device("cuda", 0))
    str(use)                                         # 4,012.34 GFLOP a step and rank ...; MFU against ...
    use.values(seconds=0.5, captions_saved=0.7)      # {"speed/tflops_per_rank": 7.9, "speed/mfu": 0.008, ...}

The peak is that of the precision of the blocks' products: FP8's with FP8 in the blocks, although other products stay
in bf16. On a CPU it is measured, before the first step and by all ranks at once, as they will share the machine; so is
the bandwidth of its memory, which no figure of the log needs, but the report's roofline does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from configs import Config
from model.rows import Rows
from profiling.flops import StepFlops
from profiling.peaks import Bandwidth, Peak, bandwidth, measured_bandwidth, measured_peak, peak
from profiling.step_flops import step_flops


@dataclass(frozen=True)
class Utilisation:
    """Of one rank. `peak` is None on a device that nobody has stated one for."""

    config: Config
    rows: Rows
    backend: str  # of attention, resolved
    device: torch.device
    peak: Peak | None
    bandwidth: Bandwidth | None
    device_name: str

    def flops(self, captions_saved: float) -> StepFlops:
        """Of a step whose captions left out this share of their slots (PackedCaptions.saved)."""
        tokens = (1 - captions_saved) * self.rows.clip * self.config.model.text.context
        return step_flops(self.config, self.rows, tokens, backend=self.backend, device=self.device.type)

    def values(self, seconds: float, captions_saved: float) -> dict[str, float]:
        """For a report on steps of so many seconds."""
        step = self.flops(captions_saved)
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
        flops = step_flops(self.config, self.rows, backend=self.backend, device=self.device.type).model_flops
        step = f"{flops / 1e9:,.2f} GFLOP a step and rank before captions are packed"
        if self.peak is None:
            return f"{step}; no MFU: no data sheet's {_precision(self.config)} peak is known for {self.device_name}"
        memory = f"; memory {self.bandwidth}" if self.bandwidth else ""
        return f"{step}; MFU against {self.peak}{memory}"


def utilisation(config: Config, rows: Rows, backend: str, device: torch.device) -> Utilisation:
    """For a run on `device`; a CPU's peak and bandwidth are measured now, on the threads that torch has now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Utilisation(config, rows, backend, device, peak(name, _precision(config)), bandwidth(name), name)
    best, memory = measured_peak(config.optim.precision), measured_bandwidth()
    return Utilisation(config, rows, backend, device, best, memory, device.type)


def _precision(config: Config) -> str:
    return config.optim.precision if config.system.linear == "bf16" else "fp8"
