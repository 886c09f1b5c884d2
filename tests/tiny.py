"""A run small enough for a test: its config, and batches that need no shards.

config = tiny_config("optim.steps=6", "batch.ssl=0", "objectives.ssl.weight=0")
batch = random_batch(config, step=3, rank=1, world_size=2)     # rows 1, 3, 5 ... of the same global batch everywhere
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from configs import Config, load_config
from data.batch import Batch
from engine.random_draws import rec_noise_draws
from model.latent import RecNoise
from model.text import pack_captions

T = TypeVar("T")
TINY = Path(__file__).parent / "tiny.yaml"
# Makes it a convolutional autoencoder; its patch size stays 8.
CONV = (
    "model.trunk=null", "model.decoder=null", "objectives.clip.weight=0", "objectives.ssl.weight=0", "batch.ssl=0",
    "model.conv={channels: 8, multipliers: [1, 2, 2, 4], groups: 4, num_res_blocks: 1}",
)  # fmt: skip


def of_all_rows(named: Mapping[str, T]) -> dict[str, T]:
    """Less what is said of a rank's own rows, whose mean over ranks is another figure at another world size."""
    of_a_rank = ("prototype_share", "latent_std_min", "latent_std_max")
    return {name: value for name, value in named.items() if name not in of_a_rank}


def tiny_config(*overrides: str) -> Config:
    """The preset tests/tiny.yaml with overrides."""
    return load_config(TINY, overrides)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of Pretrainer.forward: engine.step.model_inputs without DeepSpeed, which model tests do without."""
    names = ("images", "global_crops", "local_crops", "masks", "masked_idx")
    return {"captions": pack_captions(batch.captions)} | {name: getattr(batch, name) for name in names}


def corruption(config: Config, step: int, rank: int = 0, world_size: int = 1) -> RecNoise | None:
    """What engine.step draws for rec beside `model_inputs`."""
    draws = rec_noise_draws(config, rank, world_size)
    return draws and draws.draw(step)


def step_that_hides(config: Config, hidden: int) -> int:
    """The first step in which the encoder does not see so many patches of a rec image."""
    draws = rec_noise_draws(config, 0, 1)
    return next(step for step in range(1000) if (draws.hidden(step) if draws else 0) == hidden)


def random_batch(config: Config, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """This rank's rows of a global batch that depends on the step alone; random pixels, captions and masks."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch, views, text = config.batch, config.views, config.model.text
    patches = (views.global_size // config.model.patch_size) ** 2
    hidden = patches // 4

    def pixels(count: int, size: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    images = pixels(batch.clip, views.image_size)
    global_crops = pixels(2 * batch.ssl, views.global_size).unflatten(0, (2, batch.ssl))
    local_crops = pixels(views.num_locals * batch.ssl, views.local_size).unflatten(0, (views.num_locals, batch.ssl))
    captions = torch.randint(1, text.vocab - 1, (batch.clip, text.context), generator=generator)
    captions[:, text.context // 2] = text.vocab - 1
    captions[:, text.context // 2 + 1 :] = 0
    masks = torch.zeros(2, batch.ssl, patches, dtype=torch.bool)
    for row in range(batch.ssl):  # the first view is masked, the second whole: as half of the crops
        masks[0, row, torch.randperm(patches, generator=generator)[:hidden]] = True
    own = slice(rank, None, world_size)
    own_masks = masks[:, own].flatten(0, 1)
    return Batch(
        images=images[own],
        captions=captions[own],
        global_crops=global_crops[:, own].flatten(0, 1),
        local_crops=local_crops[:, own].flatten(0, 1),
        masks=own_masks,
        masked_idx=own_masks.flatten().nonzero().squeeze(1),
        step=step,
        keys=tuple(f"random/{row}" for row in range(batch.clip))[own],
    )
