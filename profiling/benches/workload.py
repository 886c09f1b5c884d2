"""Workloads that benches time: a ViT-S step on random pixels, and the engine on one rank without a launcher.

    config = small_step()
    batch = random_batch(config)        # random pixels and words; captions as long as in web data

Trunk S (384 wide, 12 blocks, 6 heads), 32 image-text pairs, 8 of them with 2 global and 8 local crops, 4 reconstructed,
8,192 prototypes, a text tower of 6 blocks of 384. Perceptual loss off: no weights are shipped. On a GPU it is the
preset vtp_s with 256 pairs, 64 and 32.

    with one_rank() as comm:
        config = preset_config("vtp_l", 64)
        parts = build_on_one_rank(config, comm)
        step = repeated_step(parts, random_batch(config), config)     # every call runs the next step
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs import Config, load_config
from configs.deepspeed import load_ds_config
from data.batch import Batch
from engine import distributed
from engine.build import PretrainParts, build_pretraining
from engine.step import train_step
from model.losses.comm import Comm
from profiling.cost.step_trace import random_captions
from profiling.instruments.machine import by_device, device, precision_overrides

PRESET = Path(__file__).resolve().parents[2] / "configs" / "vtp_s.yaml"
ALWAYS = ("data.streams=1", "objectives.rec.perceptual=0", "system.attention=auto")
ON_A_CPU = (
    "batch.clip=32", "batch.ssl=8", "batch.rec=4", "model.prototypes.num=8192",
    "model.text.width=384", "model.text.depth=6", "model.text.heads=6",
)  # fmt: skip
ON_A_GPU = ("batch.clip=256", "batch.ssl=64", "batch.rec=32")


def small_step(*overrides: str) -> Config:
    """The config of the ViT-S step, with `overrides`."""
    return load_config(PRESET, (*ALWAYS, *precision_overrides(), *by_device(cpu=ON_A_CPU, cuda=ON_A_GPU), *overrides))


def random_batch(config: Config, seed: int = 0) -> Batch:
    """A batch of random pixels and captions for a world of one."""
    generator, bits = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    batch, views = config.batch, config.views

    def pixels(count: int, size: int) -> torch.Tensor:
        """Eight bytes at once: one by one, those of 131,072 pairs take most of a minute."""
        number = 3 * count * size**2
        words = bits.integers(0, 2**64, -(-number // 8), dtype=np.uint64)
        return torch.from_numpy(words.view(np.uint8)[:number]).view(count, 3, size, size)

    patches = (views.global_size // config.model.patch_size) ** 2
    masks = torch.zeros(2 * batch.ssl, patches, dtype=torch.bool)
    masks[: batch.ssl, torch.randperm(patches, generator=generator)[: patches * 3 // 10]] = True  # half of the crops
    return Batch(
        images=pixels(batch.clip, views.image_size),
        captions=random_captions(batch.clip, config.model.text.context, config.model.text.vocab, generator),
        global_crops=pixels(2 * batch.ssl, views.global_size),
        local_crops=pixels(views.num_locals * batch.ssl, views.local_size),
        masks=masks,
        masked_idx=masks.flatten().nonzero().squeeze(1),
        step=0,
        keys=tuple(f"random/{row}" for row in range(batch.clip)),
    )


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# No weights of LPIPS are shipped; a kind of linear layer that cannot be compiled names system.compile itself.
OVERRIDES = ("data.streams=1", "objectives.rec.perceptual=0", "system.compile=on")


@contextmanager
def one_rank(timeout_minutes: float = 10) -> Iterator[Comm]:
    """Make this process a world of one rank within a with statement."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, also without a launcher
    try:
        yield distributed.start(timeout_minutes)
    finally:
        distributed.stop()


def preset_config(name: str, clip: int, *overrides: str) -> Config:
    """Load a preset with `clip` images a step, a quarter of them for ssl and an eighth for rec."""
    rows = (f"batch.clip={clip}", f"batch.ssl={clip // 4}", f"batch.rec={clip // 8}")
    return load_config(CONFIGS / f"{name}.yaml", (*OVERRIDES, *precision_overrides(), *rows, *overrides))


def zero1_ds_config(config: Config) -> dict[str, Any]:
    """Load ZeRO-1's DeepSpeed JSON for this config."""
    return load_ds_config(CONFIGS / "deepspeed" / "zero1.json", config, world_size=1)


def build_on_one_rank(config: Config, comm: Comm, overlap_comm: bool | None = None) -> PretrainParts:
    """Build the engine under ZeRO-1, its weights drawn on the device.

    On a GPU that takes a second, and gives other numbers than a run's. `overlap_comm` takes the place of that of the
    DeepSpeed config.
    """
    layout = zero1_ds_config(config)
    if overlap_comm is not None:
        layout["zero_optimization"] = layout["zero_optimization"] | {"overlap_comm": overlap_comm}
    return build_pretraining(config, layout, comm, draw_device=device())


def repeated_step(parts: PretrainParts, batch: Batch, config: Config) -> Callable[[], object]:
    """Return a call that runs the next training step, on one batch in memory: page-locked where it goes to a GPU."""
    numbers = count()
    if device().type == "cuda":
        batch = batch.pinned()
    return lambda: train_step(parts, replace(batch, step=next(numbers)), parts.centres, config)
