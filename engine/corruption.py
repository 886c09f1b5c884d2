"""What chance does to a step's rec images (model/latent.py says what it is): drawn on the host.

A pure function of (seed, step, place in the step's batch), so a resumed run draws what the first one would have drawn,
and so do ranks of another number for the same image. How much is hidden is a function of (seed, step) alone: the same
for every image, hence the same shapes on every rank.

    draws = Corruptor(config, Rows.per_rank(config, world_size=2), rank=1, world_size=2)
    draws.hidden(step=7)                 # 8 of 16 patches
    draws.draw(step=7).visible_idx_RV    # (R, 8), row i that of the step's image 2 i + 1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import Config
from data.hashing import hash_text, hash_words, uniform
from model.generator.draws import DrawCounts, draw
from model.latent import (
    NUM_HIDDEN_FRACTIONS,
    RecNoise,
    has_rec_noise,
    hidden_patch_probabilities,
    num_hidden_patches,
    num_patches,
)
from model.packing import RankBatchSizes

_SHARE, _PATCHES = hash_text("hidden share"), hash_text("hidden patches")  # what a hash is for


@dataclass(frozen=True)
class Corruptor:
    """The draws of one rank."""

    config: Config
    rows: RankBatchSizes
    rank: int
    world_size: int

    def draw(self, step: int) -> RecNoise:
        """Of the rank's R rec rows in this step; float32 and int64 tensors on the host."""
        model, rec = self.config.model, self.config.objectives.rec
        num_visible = num_patches(self.config) - self.hidden(step)
        is_drawn, is_noisy = model.latent == "gaussian", rec.noise.kind != "none"
        needs = DrawCounts(normals=(is_drawn + is_noisy) * num_visible * model.latent_channels, uniforms=int(is_noisy))
        drawn = draw(needs, self.config.seed, step, self._places())
        normals_RNVL = drawn.normal_BN.unflatten(1, (is_drawn + is_noisy, num_visible, model.latent_channels))
        return RecNoise(
            visible_idx_RV=None if rec.mask is None else self._visible(step, num_visible),
            sample_RVL=normals_RNVL[:, 0] if is_drawn else None,
            level_R=drawn.uniform_BU[:, 0] if is_noisy else None,
            noise_RVL=normals_RNVL[:, -1] if is_noisy else None,
        )

    def hidden(self, step: int) -> int:
        """Patches of each image that the encoder does not see, the same on every rank."""
        mask, patches = self.config.objectives.rec.mask, num_patches(self.config)
        if mask is None:
            return 0
        share, above = uniform(hash_words(self.config.seed, _SHARE, step, np.arange(2)))
        wanted = max(0.0, mask[0] + (mask[1] - mask[0]) * share) * NUM_HIDDEN_FRACTIONS
        return num_hidden_patches(min(NUM_HIDDEN_FRACTIONS - 1, int(wanted + above)), patches)

    def _visible(self, step: int, num_visible: int) -> Tensor:
        """(R, V), ascending."""
        patches = np.arange(num_patches(self.config))
        words = hash_words(self.config.seed, _PATCHES, step, self._places()[:, None], patches)
        order = np.argsort(words, axis=1, kind="stable")
        return torch.from_numpy(np.sort(order[:, :num_visible], axis=1))

    def _places(self) -> NDArray[np.int64]:
        """Where in the step's batch they are: row i of a rank is the step's position i * world size + rank."""
        first = self.rows.rec_start
        return np.arange(first, first + self.rows.rec) * self.world_size + self.rank

    def __str__(self) -> str:
        rec, patches = self.config.objectives.rec, num_patches(self.config)
        said = []
        if rec.mask is not None:
            counts = ", ".join(str(count) for count in hidden_patch_probabilities(rec.mask, patches))
            said.append(f"hides {counts} of {patches} patches (objectives.rec.mask)")
        if self.config.model.latent == "gaussian":
            said.append("draws latents (model.latent=gaussian)")
        if rec.noise.kind != "none":
            said.append(f"adds {rec.noise.kind} noise of {rec.noise.scale:g} (objectives.rec.noise)")
        return "; ".join(said)


def corruptor(config: Config, rank: int, world_size: int) -> Corruptor | None:
    """The draws that model.latent, objectives.rec.noise and objectives.rec.mask ask for; None without."""
    return (
        Corruptor(config, RankBatchSizes.per_rank(config, world_size), rank, world_size)
        if has_rec_noise(config)
        else None
    )
