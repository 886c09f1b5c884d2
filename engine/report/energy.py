"""What all ranks use together: each meter read at a report, and one report made of them.

On GPUs every rank measures its own. Without, the ranks of a machine share its processors: the first of them measures.

    with metered(device, samples_per_step=64, say=reporter.say) as energy:
        energy.read(num_steps=10)  # {"energy/joules": 812.0, "energy/joules_per_sample": 1.27, ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from engine import world
from profiling.instruments.energy import EnergyMeter, EnergyReading, combine_ranks


class Energy:
    """The ranks' meters; `meter` is None on a rank whose device another rank measures."""

    def __init__(self, meter: EnergyMeter | None, samples_per_step: int, say: Callable[[str], None]) -> None:
        self._meter, self._say, self._samples_per_step = meter, say, samples_per_step

    def read(self, num_steps: int) -> dict[str, float]:
        """`energy/*` of the `num_steps` steps since the last read; nothing where it is not measured. A collective."""
        own = None if self._meter is None else self._meter.read()
        readings: list[EnergyReading] = [reading for reading in world.gather_objects(own) if reading is not None]
        for trouble in dict.fromkeys(reading.trouble for reading in readings if reading.trouble):
            self._say(trouble)
        values = combine_ranks([reading.values for reading in readings])
        if "energy/joules" in values:
            values["energy/joules_per_sample"] = values["energy/joules"] / (num_steps * self._samples_per_step)
        return values


@contextmanager
def metered(device: torch.device, samples_per_step: int, say: Callable[[str], None]) -> Iterator[Energy]:
    """Measures while the context is open, and says at its start what is measured, or why not. A collective."""
    with ExitStack() as stack:
        is_measured_here = device.type == "cuda" or world.is_first_here()
        meter = stack.enter_context(EnergyMeter(device)) if is_measured_here else None
        for said in dict.fromkeys(world.gather_objects(None if meter is None else meter.said)):
            if said is not None:
                say(f"energy: {said}")
        yield Energy(meter, samples_per_step, say)
