"""Means of a run's losses between two reports, its speed, MFU, and each objective's fraction of the gradient.

    meter = StepMeter(comm, total_steps=300, samples_per_step=64, utilisation=device_utilisation(task))
    meter.add(result)                         # every step, no host sync
    values = meter.read(step=10, ...)         # {"loss/total": 7.1, ..., "speed/samples_per_second": 55.0, ...}

    speed/tflops_per_rank   model FLOPs a second: forward and backward, each product once
    speed/mfu               the same as a fraction of the peak
    speed/hfu               with what checkpointing, gradient cache and losses compute again

The peak is that of the precision of the blocks' products: FP8's with FP8 in the blocks, although other products stay in
bf16. On a CPU it is measured, before the first step and by all ranks at once, as they will share the machine; so is the
bandwidth of its memory, which no scalar needs, but the report's roofline does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import RunConfig
from engine.tasks.task import StepResult, TrainingTask
from model.losses.comm import Comm
from profiling.cost.flops import StepFlops
from profiling.instruments.machine import MemoryBandwidth, PeakFlops, bandwidth, measured_bandwidth, measured_peak, peak

# Named terms that are no losses: reported as health/NAME.
_PRETRAINING = ("clip_accuracy", "logit_scale", "logit_bias", "teacher_entropy", "prototype_share")
_LATENTS = ("latent_std", "latent_std_min", "latent_std_max")
_STAGE_2 = ("gan_weight", "logits_real", "logits_fake")
HEALTH_TERMS = (*_PRETRAINING, *_LATENTS, *_STAGE_2)


@dataclass(frozen=True)
class DeviceUtilisation:
    """FLOPs of a step against the peak of one rank's device; `peak` is None where it is not known."""

    precision: str  # of the blocks' products
    backend: str  # of attention, resolved
    flops: Callable[[Mapping[str, float]], StepFlops]  # TrainingTask.flops
    peak: PeakFlops | None
    bandwidth: MemoryBandwidth | None
    device_name: str

    def values(self, seconds: float, counted: Mapping[str, float]) -> dict[str, float]:
        """Return the scalars of steps of `seconds` each, whose StepResult.counted had the means `counted`."""
        step = self.flops(counted)
        values = {"speed/tflops_per_rank": step.model_flops / seconds / 1e12}
        if self.peak:
            possible = seconds * self.peak.flops_per_second
            values |= {"speed/mfu": step.model_flops / possible, "speed/hfu": step.hardware_flops / possible}
        return values

    def machine(self, world_size: int, is_compiled: bool) -> dict[str, Any]:
        """Return the content of machine.json; peaks are one rank's, None where not known."""
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


def device_utilisation(task: TrainingTask) -> DeviceUtilisation:
    """Look up a GPU's peak, or measure the CPU's peak and bandwidth now, on the threads that torch has now."""
    config, device = task.setup.config, task.setup.device
    precision = _precision(config)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        best, memory = peak(name, precision), bandwidth(name)
    else:
        name, best, memory = device.type, measured_peak(config.optim.precision), measured_bandwidth()
    return DeviceUtilisation(precision, task.setup.attention, task.flops, best, memory, name)


def _precision(config: RunConfig) -> str:
    return config.optim.precision if config.system.linear == "bf16" else "fp8"


class StepMeter:
    """Means over steps and ranks since the last read, kept on the device, and the speed."""

    def __init__(
        self, comm: Comm, total_steps: int, samples_per_step: int, utilisation: DeviceUtilisation | None = None
    ) -> None:
        self._comm, self._utilisation = comm, utilisation
        self._total_steps, self._samples_per_step = total_steps, samples_per_step
        self._sums: dict[str, Tensor] = {}
        self._schedule: dict[str, float] = {}
        self._counted: dict[str, float] = {}
        self._count = 0
        self._since = time.perf_counter()

    @property
    def num_steps(self) -> int:
        """Steps since the last read."""
        return self._count

    def add(self, result: StepResult) -> None:
        """Add a step's losses to the running sums; no host sync."""
        terms = result.losses | {"grad_norm": torch.as_tensor(result.grad_norm)}
        for name, value in terms.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._schedule = result.schedule
        self._count += 1
        for name, number in result.counted.items():
            self._counted[name] = self._counted.get(name, 0.0) + number

    def read(self, step: int, waited_seconds: float) -> dict[str, float]:
        """Return the scalars at `step` finished steps, and start anew. A collective; waits for the device once.

        `waited_seconds` is how long this rank's steps waited for data since the last read. Reported is the share of the
        rank that waited longest: the others wait for it in a collective, and cannot tell.
        """
        names = list(self._sums)
        sums = torch.stack([self._sums[name].to(self._sums[names[0]].device) for name in names])
        means = (self._comm.all_sum(sums) / (self._comm.world_size * self._count)).tolist()
        seconds = time.perf_counter() - self._since
        per_step = seconds / self._count
        longest_wait = float(self._comm.all_max(sums.new_tensor(waited_seconds)))
        values = {
            f"{'health' if name in HEALTH_TERMS else 'loss'}/{name}": mean
            for name, mean in zip(names, means, strict=True)
        }
        values["optim/grad_norm"] = values.pop("loss/grad_norm")
        values |= {f"optim/{name}": value for name, value in self._schedule.items()}
        values |= {
            "speed/samples_per_second": self._samples_per_step / per_step,
            "speed/step_ms": 1000 * per_step,
            "speed/data_wait_share": min(1.0, longest_wait / seconds),
            "speed/seconds_left": (self._total_steps - step) * per_step,
        }
        counted = {name: number / self._count for name, number in self._counted.items()}
        values |= counted
        if self._utilisation:
            values |= self._utilisation.values(per_step, counted)
        self._sums, self._counted, self._count, self._since = {}, {}, 0, time.perf_counter()
        return values


class GradFractions:
    """Measure which fraction of the trunk's gradient comes from each objective, at the last of every `every` steps.

        fractions = GradFractions(every=100, device=device)        # every=0: never
        fractions.watch(step, outputs.branch_features)         # before backward; hooks on one step in a hundred
        fractions.read(comm)                         # {"health/grad_share/clip": 0.7, "health/grad_share/ssl": 0.2}

    Measured is d (weight * objective) / d features where the model branches to its objectives (model/pretrainer.py):
    behind the trunk, and behind the bottleneck where all objectives read that. There each objective's gradient passes
    by itself in the one backward pass of the step, so it costs a norm of (T, D) an objective and no second backward. A
    fraction is an objective's norm over the sum of their norms: gradients that point apart are counted whole.
    """

    def __init__(self, every: int, device: torch.device) -> None:
        self._every, self._device = every, device
        self._squares: dict[str, Tensor] = {}

    def watch(self, step: int, forks: Mapping[str, Tensor]) -> None:
        """Hook the gradients of a forward of `step` (from 0), if it is measured; once for each micro-batch."""
        if not self._every or (step + 1) % self._every:
            return
        for name, fork in forks.items():
            self._squares.setdefault(name, torch.zeros((), device=self._device))
            if fork.requires_grad:
                fork.register_hook(partial(self._add, name))

    def read(self, comm: Comm) -> dict[str, float]:
        """Return fractions of the root mean squares over the measured steps since the last read.

        {} where no step was measured, or with one objective. A collective; waits for the device.
        """
        names, squares = list(self._squares), list(self._squares.values())
        self._squares = {}
        if len(names) < 2:
            return {}
        norms = comm.all_sum(torch.stack(squares)).sqrt()
        fractions = (norms / norms.sum()).tolist()
        return {f"health/grad_share/{name}": fraction for name, fraction in zip(names, fractions, strict=True)}

    def _add(self, name: str, gradient: Tensor) -> None:
        self._squares[name] += torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
