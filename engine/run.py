"""A run from its first step, or from a checkpoint, to its weights.

    runs/NAME/  config.yaml  ds_config.json  log.txt  log.jsonl  tensorboard/  checkpoints/  pictures/
                bad_samples.jsonl  weights.safetensors

The loop reads as the data's way: batch, step, meter; and every report_every steps the one moment in which the host
looks at the device: guard, report, stop, checkpoint.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from configs import Config, UserError, to_yaml
from data.captions import CaptionEncoder
from data.loader import Loader
from engine import archive, checkpoint, world
from engine.assemble import Assembly, assemble
from engine.guard import STOPPED, Guard
from engine.meter import Meter
from engine.pictures import latent_colours, reconstructions, write_png
from engine.report import Reporter, open_reporter
from engine.step import StepRecord, train_step
from model.imagenet import denormalise
from model.objectives.comm import Comm
from model.objectives.total import Centres

GC_EVERY = 200  # steps between two collections, on all ranks at once: a rank that collects alone makes the others wait


def train(config: Config, ds_config: dict[str, Any], comm: Comm, resume: bool) -> int:
    """Trains to optim.steps, or to a stop signal; gives the exit code. A collective."""
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    check_vocabulary(encoder, config)
    torch.manual_seed(config.seed)
    run_dir = archive.run_directory(config)
    parts = assemble(config, ds_config, comm)
    first_step, centres = _restore(parts, run_dir, resume)
    if world.is_first():
        _describe(run_dir, config, ds_config)
    guard = Guard(comm, parts.device)
    guard.listen()
    loader = Loader(config, encoder, rank=comm.rank, world_size=comm.world_size, bad_log=run_dir / "bad_samples.jsonl")
    gc.disable()
    try:
        with open_reporter(run_dir, config.optim.steps, first_step, world.is_first()) as reporter:
            for name, choice in parts.choices.items():
                reporter.say(f"{name}: {choice}")
            return _loop(config, parts, loader, guard, reporter, run_dir, first_step, centres)
    finally:
        gc.enable()
        loader.close()


def _loop(
    config: Config,
    parts: Assembly,
    loader: Loader,
    guard: Guard,
    reporter: Reporter,
    run_dir: Path,
    first_step: int,
    centres: Centres | None,
) -> int:
    system, total = config.system, config.optim.steps
    meter = Meter(parts.comm, total, config.batch.clip)
    batches = loader.iterate(first_step)
    for step in range(first_step, total):
        record = train_step(parts, next(batches), centres, config)
        centres = record.centres
        meter.add(record)
        guard.watch(record.losses["total"])
        done = step + 1
        if done % GC_EVERY == 0:
            gc.collect()
        if done % system.report_every and done != total:
            continue
        guard.check(done)
        reporter.scalars(done, meter.read(done, loader.wait_seconds) | data_health(loader))
        is_stopping = guard.should_stop()
        if _is_due(done, system.images_every, system.report_every) or done == total or is_stopping:
            show(record, run_dir, reporter, done)
        if _is_due(done, system.checkpoint_every, system.report_every) or done == total or is_stopping:
            saved = checkpoint.save(run_dir / "checkpoints", done, parts.engine, parts.teacher, centres, config)
            reporter.say(f"saved {saved}")
        if is_stopping and done != total:
            reporter.say(f"asked to stop: {done} of {total} steps are done; go on with --resume")
            return STOPPED
    if world.is_first():
        archive.consolidate(archive.find(run_dir / "checkpoints"), run_dir / "weights.safetensors")
    world.barrier()
    return 0


def show(record: StepRecord, run_dir: Path, reporter: Reporter, step: int) -> None:
    """Reconstructions and latent colours of this rank's rec rows, as files and in TensorBoard."""
    rec = record.outputs.rec
    if rec is None or not world.is_first():
        return
    target, recon = denormalise(rec.target.detach()), denormalise(rec.recon.detach())
    scale = target.shape[-1] // rec.latent.shape[-1]
    pictures = {
        "reconstructions": reconstructions(target, recon),
        "latents": latent_colours(rec.latent.detach(), scale),
    }
    folder = run_dir / "pictures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        reporter.picture(step, name, picture)
        write_png(picture, folder / f"{name}-{step:08d}.png")


def data_health(loader: Loader) -> dict[str, float]:
    """Bad samples so far by reason, as this rank has met them."""
    return {f"data/bad/{reason}": float(count) for reason, count in loader.health.counts.items()}


def check_vocabulary(encoder: CaptionEncoder, config: Config) -> None:
    """Refuses a tokenizer whose ids the text tower has no embedding for."""
    if config.objectives.clip.weight and encoder.vocab_size > config.model.text.vocab:
        raise UserError(
            f"{config.data.tokenizer} has {encoder.vocab_size} tokens but model.text.vocab={config.model.text.vocab}: "
            "every token needs an embedding; raise model.text.vocab"
        )


def _is_due(done: int, every: int, report_every: int) -> bool:
    """Whether a multiple of `every` fell into the reporting window that ends at `done`."""
    return every > 0 and done // every > (done - report_every) // every


def _restore(parts: Assembly, run_dir: Path, resume: bool) -> tuple[int, Centres | None]:
    if not resume:
        return 0, parts.centres
    state, centres = checkpoint.load(archive.find(run_dir / "checkpoints"), parts.engine, parts.teacher)
    return state.step, centres


def _describe(run_dir: Path, config: Config, ds_config: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
