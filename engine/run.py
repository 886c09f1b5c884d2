"""A run from its first step, or from a checkpoint, to its weights, whatever it trains (engine/training.py).

    runs/NAME/  config.yaml  ds_config.json  choices.json  machine.json  log.txt  log.jsonl  tensorboard/  checkpoints/
                pictures/  bad_samples.jsonl  corpus.json  lost_shards.jsonl  weights.safetensors
                profile/ (with profile.steps)
                out_of_memory/ (when it did)

The loop reads as the data's way: batch, step, meter; and every report_every steps the one moment in which the host
looks at the device: guard, report, collect garbage, stop, checkpoint.
"""

from __future__ import annotations

import gc
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import Run, to_yaml
from engine import archive, kinds, world
from engine.checkpoint.contents import load
from engine.checkpoint.saver import News, Saver
from engine.checkpoint.verified import newest_good
from engine.garbage import collected_by_hand
from engine.guard import STOPPED, Guard
from engine.instruments import Instruments, watching
from engine.meter import Meter
from engine.out_of_memory import Memory
from engine.pictures import write_png
from engine.places import checkpoints, run_directory
from engine.report import Reporter, open_reporter
from engine.training import Training
from engine.watch.watch import Place, watched
from model.objectives.comm import Comm
from profiling.memory import process_peak_bytes


def train(config: Run, ds_config: dict[str, Any], comm: Comm, resume: bool) -> int:
    """Trains to optim.steps, or to a stop signal; gives the exit code. A collective."""
    run_dir = run_directory(config)
    memory = Memory(config, ds_config, run_dir, comm.rank, comm.world_size, world.device())
    with memory.explained("assembling"):
        training = kinds.assemble(config, ds_config, comm, run_dir, resume)
    with closing(training):
        first_step, passed_over = _restore(training, checkpoints(config)) if resume else (0, [])
        if world.is_first():
            _describe(run_dir, config, ds_config, training.choices)
        guard = Guard(comm, training.device)
        guard.listen()
        with open_reporter(run_dir, config.optim.steps, first_step, world.is_first()) as reporter, collected_by_hand():
            for words in passed_over:
                reporter.say(words)
            reporter.say(training.describe())
            for name, choice in training.choices.items():
                reporter.say(f"{name}: {choice}")
            with (
                watched(config, run_dir, training.phases) as place,
                watching(training, run_dir, first_step, reporter.say) as instruments,
                closing(Saver(checkpoints(config), config)) as saver,
            ):
                return Loop(training, guard, reporter, instruments, memory, saver, place, run_dir).go(first_step)


@dataclass(frozen=True)
class Loop:
    """The loop and its occasions: every step, every report, the end."""

    training: Training
    guard: Guard
    reporter: Reporter
    instruments: Instruments
    memory: Memory
    saver: Saver
    place: Place
    directory: Path

    def go(self, first_step: int) -> int:
        """Steps from `first_step` to optim.steps; gives the exit code."""
        config = self.training.config
        total, report_every = config.optim.steps, config.system.report_every
        meter = Meter(self.training.comm, total, config.samples_per_step, self.instruments.use)
        window, phases = self.instruments.window, self.instruments.phases
        batches = self.training.batches(first_step)
        for step in range(first_step, total):
            window.before(step)
            with phases("data"):
                batch = next(batches)
            with self.memory.explained(f"in step {step}"):
                record = self.training.step(batch)
            window.after(step)
            done = self.place.step = step + 1
            meter.add(record)
            self.guard.watch(record.losses["total"])
            if done % report_every == 0 or done == total:
                with phases("report"):
                    is_stopping = self._report(done, meter)
                if is_stopping:
                    self.reporter.say(f"asked to stop: {done} of {total} steps are done; go on with --resume")
                    return STOPPED
        self.reporter.say(f"peak memory of this rank: {process_peak_bytes() / 2**30:.2f} GiB")
        if world.is_first():
            archive.consolidate(archive.find(checkpoints(config)), self.directory / "weights.safetensors")
        world.barrier()
        return 0

    def _report(self, done: int, meter: Meter) -> bool:
        """The host looks at the device; pictures and a checkpoint when they are due. Whether to stop before the end."""
        training, config = self.training, self.training.config
        system = config.system
        beside = self.instruments.read(done, meter.num_steps)
        self.guard.check(done)
        gc.collect()
        scalars = meter.read(done, training.wait_seconds()) | beside | training.health()
        self.reporter.scalars(done, scalars | self._tell(self.saver.news()))
        is_stopping, is_last = self.guard.should_stop(), done == config.optim.steps
        is_leaving = is_stopping or is_last
        if is_leaving or is_due(done, system.images_every, system.report_every):
            self._show(done)
        if is_leaving or is_due(done, system.checkpoint.every, system.report_every):
            self.saver.save(done, training.kept())
        if is_leaving:
            self._tell(self.saver.finish())
        return is_stopping and not is_last

    def _tell(self, news: list[News]) -> dict[str, float]:
        """Says what became of checkpoints; the last one's scalars."""
        for each in news:
            self.reporter.say(each.words)
        return dict(news[-1].scalars) if news else {}

    def _show(self, done: int) -> None:
        """What the first rank's last step looks like, as files and in TensorBoard."""
        if not world.is_first():
            return
        folder = self.directory / "pictures"
        for name, picture in self.training.pictures().items():
            folder.mkdir(exist_ok=True)
            self.reporter.picture(done, name, picture)
            write_png(picture, folder / f"{name}-{done:08d}.png")


def is_due(done: int, every: int, report_every: int) -> bool:
    """Whether a multiple of `every` fell into the reporting window that ends at `done`."""
    return every > 0 and done // every > (done - report_every) // every


def _restore(training: Training, root: Path) -> tuple[int, list[str]]:
    """Steps done, and what is to be said of checkpoints that were passed over."""
    passed_over: list[str] = []
    state, whole = load(newest_good(root, passed_over.append), training.kept())
    training.restored(whole)
    return state.step, passed_over


def _describe(run_dir: Path, config: Run, ds_config: dict[str, Any], choices: dict[str, str]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    (run_dir / "choices.json").write_text(json.dumps(choices, indent=2) + "\n")
