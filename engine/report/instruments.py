"""What watches a run from beside, put together: none of it changes a step, or waits for the device between reports.

with watching(training, run_dir, reporter) as instruments:
    instruments.window.before(step)         # profiler window; and .after(step)
    with instruments.phases("data"): ...
    instruments.read(num_steps=10)          # {"phase/trunk_ms": ..., "straggler/rank": ..., "comm/all_gather_mb": ...,
                                            #  "memory/peak_max_gib": ..., "energy/joules": ...} since the last read

What a report must know of the machine goes to RUN/machine.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.assemble import resolve_compile
from engine.complaint import complain
from engine.report.energy import Energy, metered
from engine.report.rank_memory import report as memory_of_ranks
from engine.report.reporter import Reporter
from engine.report.timing import report as phase_times
from engine.report.traffic import Traffic, counting
from engine.report.utilisation import Utilisation, utilisation
from engine.training import Training
from model.losses.comm import Comm
from profiling.instruments.phases import PhaseTimer
from profiling.instruments.profiler import ProfilerWindow


@dataclass(frozen=True)
class Instruments:
    """Of one rank. `use` is read by the meter, which knows how long the steps took."""

    comm: Comm
    phases: PhaseTimer
    window: ProfilerWindow
    use: Utilisation
    energy: Energy
    traffic: Traffic

    def read(self, num_steps: int) -> dict[str, float]:
        """What the last `num_steps` steps took and moved. A collective."""
        moved = self.traffic.take(num_steps)
        return phase_times(self.phases, self.comm) | moved | memory_of_ranks(self.comm) | self.energy.read(num_steps)


@contextmanager
def watching(training: Training, run_dir: Path, reporter: Reporter) -> Iterator[Instruments]:
    """Starts the instruments, says what is measured and against what, and ends them. A collective."""
    config, comm, phases = training.config, training.comm, training.phases
    use = utilisation(training)
    reporter.say(f"compute: {use}")
    machine = use.machine(comm.world_size, resolve_compile(config, training.device)[0])
    reporter.keep(run_dir / "machine.json", json.dumps(machine, indent=2) + "\n")
    with (
        ProfilerWindow(config, phases, run_dir, comm.rank, reporter.say if comm.rank == 0 else complain) as window,
        metered(training.device, config.samples_per_step, reporter.say) as energy,
        counting() as traffic,
    ):
        phases.read()  # what came before belongs to no step
        yield Instruments(comm, phases, window, use, energy, traffic)
