"""A run from its first step, or from a checkpoint, to its weights.

    runs/NAME/  config.yaml  ds_config.json  choices.json  machine.json  log.txt  log.jsonl  tensorboard/  checkpoints/
                pictures/  bad_samples.jsonl  weights.safetensors  profile/ (with profile.steps)
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

from configs import Config, UserError, to_yaml
from data.captions import CaptionEncoder
from data.loader import Loader
from engine import archive, checkpoint, world
from engine.assemble import Assembly, assemble
from engine.garbage import collected_by_hand
from engine.guard import STOPPED, Guard
from engine.instruments import Instruments, watching
from engine.meter import Meter
from engine.out_of_memory import Memory
from engine.pictures import latent_colours, reconstructions, write_png
from engine.report import Reporter, open_reporter
from engine.step import StepRecord, train_step
from model.describe import describe
from model.imagenet import denormalise
from model.objectives.comm import Comm
from model.objectives.total import Centres
from model.rows import Rows
from profiling.memory import process_peak_bytes


def train(config: Config, ds_config: dict[str, Any], comm: Comm, resume: bool) -> int:
    """Trains to optim.steps, or to a stop signal; gives the exit code. A collective."""
    run_dir = archive.run_directory(config)
    with closing(make_loader(config, comm, run_dir / "bad_samples.jsonl")) as loader:
        memory = Memory(config, ds_config, run_dir, comm.rank, comm.world_size, world.device())
        with memory.explained("assembling"):
            parts = assemble(config, ds_config, comm, resume)
        first_step, centres = _restore(parts, run_dir, resume)
        if world.is_first():
            _describe(run_dir, config, ds_config, parts.choices)
        guard = Guard(comm, parts.device)
        guard.listen()
        with open_reporter(run_dir, config.optim.steps, first_step, world.is_first()) as reporter, collected_by_hand():
            reporter.say(describe(config, Rows.per_rank(config, comm.world_size)))
            for name, choice in parts.choices.items():
                reporter.say(f"{name}: {choice}")
            with watching(config, parts, run_dir, first_step, reporter.say) as instruments:
                run = Run(config, parts, loader, guard, reporter, instruments, memory, run_dir)
                return run.go(first_step, centres)


def make_loader(config: Config, comm: Comm, bad_log: Path) -> Loader:
    """This rank's loader. Made before the model: on a large run a mistake in the data is told minutes earlier."""
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    check_vocabulary(encoder, config)
    return Loader(
        config,
        encoder,
        rank=comm.rank,
        world_size=comm.world_size,
        bad_log=bad_log,
        exchange=world.gather_objects,
    )


@dataclass(frozen=True)
class Run:
    """The loop and its occasions: every step, every report, the end."""

    config: Config
    parts: Assembly
    loader: Loader
    guard: Guard
    reporter: Reporter
    instruments: Instruments
    memory: Memory
    directory: Path

    def go(self, first_step: int, centres: Centres | None) -> int:
        """Steps from `first_step` to optim.steps; gives the exit code."""
        total, report_every = self.config.optim.steps, self.config.system.report_every
        meter = Meter(self.parts.comm, total, self.config.batch.clip, self.instruments.use)
        window, phases = self.instruments.window, self.instruments.phases
        batches = self.loader.iterate(first_step)
        for step in range(first_step, total):
            window.before(step)
            with phases("data"):
                batch = next(batches)
            with self.memory.explained(f"in step {step}"):
                record = train_step(self.parts, batch, centres, self.config)
            window.after(step)
            centres, done = record.centres, step + 1
            meter.add(record)
            self.guard.watch(record.losses["total"])
            if done % report_every == 0 or done == total:
                with phases("report"):
                    is_stopping = self._report(done, record, meter)
                if is_stopping:
                    self.reporter.say(f"asked to stop: {done} of {total} steps are done; go on with --resume")
                    return STOPPED
        self.reporter.say(f"peak memory of this rank: {process_peak_bytes() / 2**30:.2f} GiB")
        if world.is_first():
            archive.consolidate(archive.find(self.directory / "checkpoints"), self.directory / "weights.safetensors")
        world.barrier()
        return 0

    def _report(self, done: int, record: StepRecord, meter: Meter) -> bool:
        """The host looks at the device; pictures and a checkpoint when they are due. Whether to stop before the end."""
        system = self.config.system
        beside = self.instruments.read(done, meter.num_steps)
        self.guard.check(done)
        gc.collect()
        self.reporter.scalars(done, meter.read(done, self.loader.wait_seconds) | beside | data_health(self.loader))
        is_stopping, is_last = self.guard.should_stop(), done == self.config.optim.steps
        if is_stopping or is_last or is_due(done, system.images_every, system.report_every):
            self._show(done, record)
        if is_stopping or is_last or is_due(done, system.checkpoint_every, system.report_every):
            root = self.directory / "checkpoints"
            saved = checkpoint.save(root, done, self.parts.engine, self.parts.teacher, record.centres, self.config)
            self.reporter.say(f"saved {saved}")
        return is_stopping and not is_last

    def _show(self, done: int, record: StepRecord) -> None:
        """Reconstructions and latent colours of the first rank's rec rows, as files and in TensorBoard."""
        rec = record.outputs.rec
        if rec is None or not world.is_first():
            return
        target, recon = denormalise(rec.target.detach()), denormalise(rec.recon.detach())
        scale = target.shape[-1] // rec.latent.shape[-1]
        pictures = {
            "reconstructions": reconstructions(target, recon),
            "latents": latent_colours(rec.latent.detach(), scale),
        }
        folder = self.directory / "pictures"
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            self.reporter.picture(done, name, picture)
            write_png(picture, folder / f"{name}-{done:08d}.png")


def data_health(loader: Loader) -> dict[str, float]:
    """Bad samples so far by reason: what the index left out, and what each rank met since it started. A collective.

    A sample that two ranks met in two epochs counts for both; `bad_samples.jsonl` has each once.
    """
    health = loader.health
    met = world.gather_objects(health.counts - health.left_out)
    counts = sum(met, health.left_out)
    return {f"data/bad/{reason}": float(count) for reason, count in sorted(counts.items())}


def check_vocabulary(encoder: CaptionEncoder, config: Config) -> None:
    """Refuses a tokenizer whose ids the text tower has no embedding for."""
    if config.objectives.clip.weight and encoder.vocab_size > config.model.text.vocab:
        raise UserError(
            f"{config.data.tokenizer} has {encoder.vocab_size} tokens but model.text.vocab={config.model.text.vocab}: "
            "every token needs an embedding; raise model.text.vocab"
        )


def is_due(done: int, every: int, report_every: int) -> bool:
    """Whether a multiple of `every` fell into the reporting window that ends at `done`."""
    return every > 0 and done // every > (done - report_every) // every


def _restore(parts: Assembly, run_dir: Path, resume: bool) -> tuple[int, Centres | None]:
    if not resume:
        return 0, parts.centres
    state, centres = checkpoint.load(archive.find(run_dir / "checkpoints"), parts.engine, parts.teacher)
    return state.step, centres


def _describe(run_dir: Path, config: Config, ds_config: dict[str, Any], choices: dict[str, str]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    (run_dir / "choices.json").write_text(json.dumps(choices, indent=2) + "\n")
