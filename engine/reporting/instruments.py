"""Instruments of a run, read at reports: phases, collectives' bytes, memory of every rank, energy, profiler window.

    with measuring(task, run_dir, reporter) as instruments:
        instruments.window.before(step)         # profiler window; and .after(step)
        with instruments.phases("data"): ...
        instruments.read(num_steps=10)          # {"phase/trunk_ms": ..., "straggler/rank": ..., "energy/joules": ...,
                                                #  "comm/all_gather_mb": ..., "memory/peak_max_gib": ...}

None of them changes a step, or waits for the device between reports. What a report page must know of the machine goes
to RUN/machine.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import distributed, zero
from engine.build import resolve_compile
from engine.reporting.phase_timing import phase_times
from engine.reporting.reporter import Reporter
from engine.reporting.step_meter import DeviceUtilisation, device_utilisation
from engine.stderr import print_error
from engine.tasks.task import TrainingTask
from model.losses.comm import Comm
from profiling.instruments.energy import EnergyMeter, EnergyReading, combine_ranks
from profiling.instruments.memory import peak_and_current_bytes
from profiling.instruments.phases import PhaseTimer
from profiling.instruments.profiler import ProfilerWindow

REPORTED = ("all_gather", "reduce_scatter", "all_reduce")


class EnergyReport:
    """Energy that all ranks use together; `meter` is None on a rank whose device another rank measures.

        with measure_energy(device, samples_per_step=64, log=reporter.message) as energy:
            energy.read(num_steps=10)  # {"energy/joules": 812.0, "energy/joules_per_sample": 1.27, ...}

    On GPUs every rank measures its own. Without, the ranks of a machine share its processors: the first of them
    measures.
    """

    def __init__(self, meter: EnergyMeter | None, samples_per_step: int, log: Callable[[str], None]) -> None:
        self._meter, self._log, self._samples_per_step = meter, log, samples_per_step

    def read(self, num_steps: int) -> dict[str, float]:
        """Return `energy/*` of the `num_steps` steps since the last read; {} where it is not measured. A collective."""
        own = None if self._meter is None else self._meter.read()
        readings: list[EnergyReading] = [reading for reading in distributed.gather_objects(own) if reading is not None]
        for trouble in dict.fromkeys(reading.error for reading in readings if reading.error):
            self._log(trouble)
        values = combine_ranks([reading.values for reading in readings])
        if "energy/joules" in values:
            values["energy/joules_per_sample"] = values["energy/joules"] / (num_steps * self._samples_per_step)
        return values


@contextmanager
def measure_energy(device: torch.device, samples_per_step: int, log: Callable[[str], None]) -> Iterator[EnergyReport]:
    """Measure inside the `with`; log at its start what is measured, or why not. A collective."""
    with ExitStack() as stack:
        is_measured_here = device.type == "cuda" or distributed.is_first_of_host()
        meter = stack.enter_context(EnergyMeter(device)) if is_measured_here else None
        for source in dict.fromkeys(distributed.gather_objects(None if meter is None else meter.description)):
            if source is not None:
                log(f"energy: {source}")
        yield EnergyReport(meter, samples_per_step, log)


def memory_of_ranks(comm: Comm) -> dict[str, float]:
    """Return the least, mean and most memory of the ranks, and which rank has the most. A collective between hosts.

        {"memory/peak_min_gib": 61.2, "memory/peak_mean_gib": 61.9, "memory/peak_max_gib": 70.4,
         "memory/peak_rank": 17.0, "memory/now_min_gib": ...}

    `peak` is the most so far, `now` what is held at the report, `reserved` (CUDA) what the allocator took from the
    device at most. On a CPU they are the process's resident memory, with its libraries, its loader and pages that ranks
    share. The rank with the most is the one that runs out first: its number says where to look.
    """
    held = peak_and_current_bytes()
    shared = torch.zeros(len(held), comm.world_size, dtype=torch.float64)
    shared[:, comm.rank] = torch.tensor(list(held.values()), dtype=torch.float64)
    values: dict[str, float] = {}
    for name, of_ranks in zip(held, (comm.all_sum(shared) / 2**30).tolist(), strict=True):
        values |= memory_spread(name, of_ranks)
    return values


def memory_spread(name: str, gib: list[float]) -> dict[str, float]:
    """Return min, mean, max and the rank with the most: "peak", [1.0, 3.0] -> peak_mean_gib 2.0, peak_rank 1.0, ..."""
    most = max(gib)
    sizes = {"min": min(gib), "mean": sum(gib) / len(gib), "max": most}
    return {f"memory/{name}_{key}_gib": size for key, size in sizes.items()} | {
        f"memory/{name}_rank": float(gib.index(most))
    }


@dataclass
class CollectiveTraffic:
    """Bytes that this rank's collectives moved since the last `take`, by kind: integers on the host.

        with count_traffic() as traffic:
            train_step(...)
        traffic.bytes["all_gather"], traffic.calls["all_gather"]          # 579272, 107

    A message is counted as the whole tensor, the convention of NCCL's own tests: the output of an all-gather, the input
    of a reduce-scatter, the tensor of an all-reduce. What a rank sends is less or more;
    profiling/cost/communication.py has the factors. Pickled objects (data health at reports) are not counted.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, num_bytes: int) -> None:
        """Count one call; an observer for zero.observe_deepspeed and distributed.observe_collectives."""
        self.bytes[kind] += num_bytes
        self.calls[kind] += 1

    def take(self, num_steps: int) -> dict[str, float]:
        """Return MB (10^6 bytes) a step by scalar name, and count from 0 again."""
        values = {f"comm/{kind}_mb": self.bytes[kind] / num_steps / 1e6 for kind in REPORTED}
        self.bytes.clear()
        self.calls.clear()
        return values


@contextmanager
def count_traffic() -> Iterator[CollectiveTraffic]:
    """Count inside the `with`. Enter after the engine is built: DeepSpeed must have its backend."""
    traffic = CollectiveTraffic()
    with distributed.observe_collectives(traffic.note), zero.observe_deepspeed(traffic.note):
        yield traffic


@dataclass(frozen=True)
class Instruments:
    """The instruments of one rank; the StepMeter, which times the steps, reads `utilisation`."""

    comm: Comm
    phases: PhaseTimer
    window: ProfilerWindow
    utilisation: DeviceUtilisation
    energy: EnergyReport
    traffic: CollectiveTraffic

    def read(self, num_steps: int) -> dict[str, float]:
        """Return the scalars of the last `num_steps` steps. A collective."""
        moved = self.traffic.take(num_steps)
        return phase_times(self.phases, self.comm) | moved | memory_of_ranks(self.comm) | self.energy.read(num_steps)


@contextmanager
def measuring(task: TrainingTask, run_dir: Path, reporter: Reporter) -> Iterator[Instruments]:
    """Run the instruments inside the `with`; log what is measured, and against which peak. A collective."""
    setup = task.setup
    config, comm, phases = setup.config, setup.comm, setup.phases
    utilisation = device_utilisation(task)
    reporter.message(f"compute: {utilisation}")
    machine = utilisation.machine(comm.world_size, resolve_compile(config, setup.device)[0])
    reporter.write_file(run_dir / "machine.json", json.dumps(machine, indent=2) + "\n")
    log = reporter.message if comm.rank == 0 else print_error
    with (
        ProfilerWindow(config, phases, run_dir, comm.rank, log) as window,
        measure_energy(setup.device, config.samples_per_step, reporter.message) as energy,
        count_traffic() as traffic,
    ):
        phases.read()  # what came before belongs to no step
        yield Instruments(comm, phases, window, utilisation, energy, traffic)
