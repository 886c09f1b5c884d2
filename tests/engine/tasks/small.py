"""Steps of any kind of run, as the engine's loop takes them; found by name in new processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from configs import RunConfig
from configs.deepspeed import load_ds_config
from engine import zero
from engine.checkpoint import reading
from engine.checkpoint.contents import load_checkpoint
from engine.checkpoint.saver import save
from engine.tasks.task import TrainingTask
from engine.trainer import build_task
from model.losses.comm import Comm
from tests.engine.ranks import DEEPSPEED


def build(config: RunConfig, comm: Comm, stage: str, run_dir: Path, is_resumed: bool = False) -> TrainingTask:
    """Assembled under configs/deepspeed/{stage}.json."""
    ds_config = load_ds_config(DEEPSPEED / f"{stage}.json", config, comm.world_size)
    return build_task(config, ds_config, comm, run_dir, is_resumed)


def train(
    comm: Comm, config: RunConfig, stage: str, run_dir: Path, last: int, start_from: Path | None = None
) -> dict[str, Any]:
    """Steps up to `last`, from the start or from a checkpoint directory, and a checkpoint at the end.

    Gives "losses", the total of each step as the mean over ranks, and "weights" by name: whole, of every engine.
    """
    training = build(config, comm, stage, run_dir, is_resumed=start_from is not None)
    first = 0
    if start_from is not None:
        first = load_checkpoint(reading.latest_readable(start_from), training.train_state()).step
    batches, losses = training.data.batches(first), []
    for _ in range(first, last):
        record = training.step(next(batches))
        losses.append(float(comm.all_sum(record.losses["total"])) / comm.world_size)
    save(run_dir / "checkpoints", last, training.train_state(), config)
    training.data.close()
    return {"losses": losses, "weights": _weights(training)}


def _weights(training: TrainingTask) -> dict[str, Tensor]:
    found = {}
    for engine_name, engine in training.train_state().engines.items():
        for name, parameter in engine.module.named_parameters():
            with zero.gathered([parameter]):
                found[f"{engine_name}/{name}"] = parameter.detach().float().clone()
    return found
