"""Running means between two reports, kept on the device: one sync a report instead of one a step.

meter = Meter(comm, total_steps=300, samples_per_step=64, utilisation=use)
meter.add(record)                         # every step
values = meter.read(step=10)              # at a report: {"loss/total": 7.1, ..., "speed/samples_per_second": 55.0}
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from engine.report.utilisation import Utilisation
from engine.training import Record
from model.losses.comm import Comm

# Named terms that are no losses.
_PRETRAINING = ("clip_accuracy", "logit_scale", "logit_bias", "teacher_entropy", "prototype_share")
_LATENTS = ("latent_std", "latent_std_min", "latent_std_max")
_STAGE_2 = ("gan_weight", "logits_real", "logits_fake")
HEALTH = (*_PRETRAINING, *_LATENTS, *_STAGE_2)


class Meter:
    """Means over steps and ranks since the last read, and the speed."""

    def __init__(
        self, comm: Comm, total_steps: int, samples_per_step: int, utilisation: Utilisation | None = None
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

    def add(self, record: Record) -> None:
        """Adds a step's losses to the running sums; no sync."""
        terms = record.losses | {"grad_norm": torch.as_tensor(record.grad_norm)}
        for name, value in terms.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._schedule = record.schedule
        self._count += 1
        for name, number in record.counted.items():
            self._counted[name] = self._counted.get(name, 0.0) + number

    def read(self, step: int, waited_seconds: float) -> dict[str, float]:
        """The report at `step` finished steps, and a new start. A collective; waits for the device once.

        `waited_seconds` is the time this rank's steps spent waiting for data since the last read. Reported is the share
        of the rank that waited longest: the others stand still with it, in a collective, and cannot tell.
        """
        names = list(self._sums)
        sums = torch.stack([self._sums[name].to(self._sums[names[0]].device) for name in names])
        means = (self._comm.all_sum(sums) / (self._comm.world_size * self._count)).tolist()
        seconds = time.perf_counter() - self._since
        per_step = seconds / self._count
        longest_wait = float(self._comm.all_max(sums.new_tensor(waited_seconds)))
        values = {
            f"{'health' if name in HEALTH else 'loss'}/{name}": mean for name, mean in zip(names, means, strict=True)
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
