"""The engine in a bench: one rank without a launcher, a preset cut to what the rank computes.

with one_rank() as comm:
    config = configured("vtp_l", 64)
    parts = assembled(config, comm)
    step = stepper(parts, random_batch(config), config)     # takes the next step at every call
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from configs import Config, load_config
from configs.ds import load_ds_config
from data.batch import Batch
from engine import world
from engine.assemble import Assembly, assemble
from engine.step import train_step
from model.objectives.comm import Comm
from profiling.machine import device, precision_overrides

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# No weights of LPIPS are shipped; a kind of linear layer that cannot be compiled names system.compile itself.
OVERRIDES = ("data.streams=1", "objectives.rec.perceptual=0", "system.compile=on")


@contextmanager
def one_rank(timeout_minutes: float = 10) -> Iterator[Comm]:
    """Inside, this process is a world of one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants to be told, also where no launcher is
    try:
        yield world.start(timeout_minutes)
    finally:
        world.stop()


def configured(name: str, clip: int, *overrides: str) -> Config:
    """A preset with so many clip images a step, a quarter of them for ssl and an eighth for rec."""
    rows = (f"batch.clip={clip}", f"batch.ssl={clip // 4}", f"batch.rec={clip // 8}")
    return load_config(CONFIGS / f"{name}.yaml", (*OVERRIDES, *precision_overrides(), *rows, *overrides))


def layout_of(config: Config) -> dict[str, Any]:
    """ZeRO-1's DeepSpeed config."""
    return load_ds_config(CONFIGS / "deepspeed" / "zero1.json", config, world_size=1)


def assembled(config: Config, comm: Comm, overlap_comm: bool | None = None) -> Assembly:
    """The engine under ZeRO-1, its weights drawn on the device: on a GPU in a second, for other numbers than a run's.

    `overlap_comm` takes the place of that of the DeepSpeed config.
    """
    layout = layout_of(config)
    if overlap_comm is not None:
        layout["zero_optimization"] = layout["zero_optimization"] | {"overlap_comm": overlap_comm}
    return assemble(config, layout, comm, draw_device=device())


def stepper(parts: Assembly, batch: Batch, config: Config) -> Callable[[], object]:
    """Takes the next training step at every call, on one batch in memory: page-locked where it goes to a GPU."""
    numbers = count()
    if device().type == "cuda":
        batch = batch.pinned()
    return lambda: train_step(parts, replace(batch, step=next(numbers)), parts.centres, config)
