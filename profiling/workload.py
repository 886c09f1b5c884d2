"""The step that benches time: a ViT-S tokenizer at 256 px with every objective, on random pixels.

Trunk S (384 wide, 12 blocks, 6 heads), 32 image-text pairs, 8 of them with 2 global and 8 local crops, 4 reconstructed,
8,192 prototypes, a text tower of 6 blocks of 384. Perceptual loss off: no weights are shipped. On a GPU it is the
preset vtp_s as it stands, with 256 pairs, 64 and 32.

    config = small_step()
    batch = random_batch(config)        # random pixels and words; captions as long as in web data
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from configs import Config, load_config
from data.batch import Batch
from data.masking import hidden_patches
from model.rows import Rows
from profiling.machine import precision_overrides, sized

PRESET = Path(__file__).resolve().parents[1] / "configs" / "vtp_s.yaml"
ALWAYS = ("data.streams=1", "objectives.rec.perceptual=0", "system.attention=auto")
ON_A_CPU = (
    "batch.clip=32", "batch.ssl=8", "batch.rec=4", "model.prototypes.num=8192",
    "model.text.width=384", "model.text.depth=6", "model.text.heads=6",
)  # fmt: skip
ON_A_GPU = ("batch.clip=256", "batch.ssl=64", "batch.rec=32")
MEAN_CAPTION, CAPTION_SIGMA = 20, 0.5  # tokens; log-normal, an assumption about web captions


def small_step(*overrides: str) -> Config:
    """The config of the step, changed by `overrides`."""
    return load_config(PRESET, (*ALWAYS, *precision_overrides(), *sized(cpu=ON_A_CPU, cuda=ON_A_GPU), *overrides))


def random_batch(config: Config, seed: int = 0) -> Batch:
    """One rank's batch of a world of one."""
    generator, bits = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    batch, views = config.batch, config.views

    def pixels(count: int, size: int) -> torch.Tensor:
        """Eight at once: one by one, those of 131,072 pairs take most of a minute."""
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


def imagined_batch(config: Config, rows: Rows) -> Batch:
    """A batch of `rows` as the loader would give it, captions excepted on the meta device: shapes without memory."""
    views, context = config.views, config.model.text.context
    patches = (views.global_size // config.model.patch_size) ** 2

    def pixels(count: int, size: int) -> torch.Tensor:
        return torch.empty(count, 3, size, size, dtype=torch.uint8, device="meta")

    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=pixels(rows.clip, views.image_size),
        captions=random_captions(rows.clip, context, config.model.text.vocab, generator),
        global_crops=pixels(2 * rows.ssl, views.global_size),
        local_crops=pixels(views.num_locals * rows.ssl, views.local_size),
        masks=torch.empty(2 * rows.ssl, patches, dtype=torch.bool, device="meta"),
        masked_idx=torch.empty(hidden_patches(config, rows.ssl), dtype=torch.int64, device="meta"),
        step=0,
        keys=(),
    )


def random_captions(count: int, context: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    """(count, context) int64: random words, as many as captions of the web have; end-of-text is vocab - 1."""
    mean_of_log = math.log(MEAN_CAPTION) - CAPTION_SIGMA**2 / 2
    drawn = torch.empty(count).log_normal_(mean_of_log, CAPTION_SIGMA, generator=generator)
    lengths = drawn.round().clamp(3, context).long().unsqueeze(1)
    slot_C = torch.arange(context)
    words = torch.randint(1, vocab - 1, (count, context), generator=generator)
    captions = torch.where(slot_C < lengths - 1, words, 0)
    return captions.masked_fill(slot_C == lengths - 1, vocab - 1)
