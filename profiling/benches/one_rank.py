"""The engine in a bench: one rank without a launcher, a preset cut to what the rank computes.

with one_rank() as comm:
    config = configured("vtp_l", 64)
    parts = assemble(config, layout_of(config), comm)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import Config, load_config
from configs.ds import load_ds_config
from engine import world
from model.objectives.comm import Comm

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
    return load_config(CONFIGS / f"{name}.yaml", (*OVERRIDES, *rows, *overrides))


def layout_of(config: Config) -> dict[str, Any]:
    """ZeRO-1's DeepSpeed config."""
    return load_ds_config(CONFIGS / "deepspeed" / "zero1.json", config, world_size=1)
