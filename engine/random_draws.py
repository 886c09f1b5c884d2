"""Random numbers of one step, drawn on the host: noise and masks for rec images, the segments that drop path keeps.

    draws = RecNoiseDraws(config, Rows.per_rank(config, world_size=2), rank=1, world_size=2)
    draws.hidden(step=7)                 # 8 of 16 patches
    draws.draw(step=7).visible_idx_RV    # (R, 8), row i for image 2 i + 1 of the step

    drops = DropPathDraws(segments=((17, 257), (32, 37)), rate=0.3, depth=12, seed=0, rank=1)
    drops.draw(step=7)       # (12, 2, 34) int64: for each block and branch 12 of 17 segments, then 22 of 32, ascending

Pure functions of seed, step and position: a resumed run draws what the first one would have drawn, and nothing waits
for a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import Config, UserError
from data.hashing import hash_text, hash_words, uniform
from kernels.attention import Segments
from model.describe import step_layout, step_layouts
from model.generator.draws import DrawCounts, draw
from model.latent import (
    NUM_HIDDEN_FRACTIONS,
    RecNoise,
    has_rec_noise,
    hidden_patch_probabilities,
    num_hidden_patches,
    num_patches,
)
from model.packing import RankBatchSizes, kept_segments

_SHARE, _PATCHES = hash_text("hidden share"), hash_text("hidden patches")  # what a hash is for
BRANCHES = 2  # attention, MLP
_DROP_PATH_HASH = hash_text("drop_path")  # what a hash is for: no other draw of the run has this word


@dataclass(frozen=True)
class RecNoiseDraws:
    """Noise and masks for the rec images of one rank (used by model/latent.py).

    An image's numbers depend on (seed, step, position in the step's batch), so ranks of another number draw the same
    for it. How many patches are hidden depends on (seed, step) alone: the same for every image, hence the same shapes
    on every rank.
    """

    config: Config
    rows: RankBatchSizes
    rank: int
    world_size: int

    def draw(self, step: int) -> RecNoise:
        """Draw for the rank's R rec rows in this step; float32 and int64 tensors on the host."""
        model, rec = self.config.model, self.config.objectives.rec
        num_visible = num_patches(self.config) - self.hidden(step)
        is_drawn, is_noisy = model.latent == "gaussian", rec.noise.kind != "none"
        needs = DrawCounts(normals=(is_drawn + is_noisy) * num_visible * model.latent_channels, uniforms=int(is_noisy))
        drawn = draw(needs, self.config.seed, step, self._positions())
        normals_RNVL = drawn.normal_BN.unflatten(1, (is_drawn + is_noisy, num_visible, model.latent_channels))
        return RecNoise(
            visible_idx_RV=None if rec.mask is None else self._visible(step, num_visible),
            sample_RVL=normals_RNVL[:, 0] if is_drawn else None,
            level_R=drawn.uniform_BU[:, 0] if is_noisy else None,
            noise_RVL=normals_RNVL[:, -1] if is_noisy else None,
        )

    def hidden(self, step: int) -> int:
        """Return how many patches of each image the encoder does not see, the same on every rank."""
        mask, patches = self.config.objectives.rec.mask, num_patches(self.config)
        if mask is None:
            return 0
        share, above = uniform(hash_words(self.config.seed, _SHARE, step, np.arange(2)))
        wanted = max(0.0, mask[0] + (mask[1] - mask[0]) * share) * NUM_HIDDEN_FRACTIONS
        return num_hidden_patches(min(NUM_HIDDEN_FRACTIONS - 1, int(wanted + above)), patches)

    def _visible(self, step: int, num_visible: int) -> Tensor:
        """Draw the visible patches of each row: (R, V), ascending."""
        patches = np.arange(num_patches(self.config))
        words = hash_words(self.config.seed, _PATCHES, step, self._positions()[:, None], patches)
        order = np.argsort(words, axis=1, kind="stable")
        return torch.from_numpy(np.sort(order[:, :num_visible], axis=1))

    def _positions(self) -> NDArray[np.int64]:
        """Return the rows' positions in the step's batch: row i of a rank is at i * world size + rank."""
        first = self.rows.rec_start
        return np.arange(first, first + self.rows.rec) * self.world_size + self.rank

    def __str__(self) -> str:
        rec, patches = self.config.objectives.rec, num_patches(self.config)
        clauses = []
        if rec.mask is not None:
            counts = ", ".join(str(count) for count in hidden_patch_probabilities(rec.mask, patches))
            clauses.append(f"hides {counts} of {patches} patches (objectives.rec.mask)")
        if self.config.model.latent == "gaussian":
            clauses.append("draws latents (model.latent=gaussian)")
        if rec.noise.kind != "none":
            clauses.append(f"adds {rec.noise.kind} noise of {rec.noise.scale:g} (objectives.rec.noise)")
        return "; ".join(clauses)


def rec_noise_draws(config: Config, rank: int, world_size: int) -> RecNoiseDraws | None:
    """Return the draws for model.latent, objectives.rec.noise and objectives.rec.mask; None where all are off."""
    return (
        RecNoiseDraws(config, RankBatchSizes.per_rank(config, world_size), rank, world_size)
        if has_rec_noise(config)
        else None
    )


@dataclass(frozen=True)
class DropPathDraws:
    """Which segments every residual branch of the trunk sees on one rank (model/packing.py).

    Drawn from (seed, step, block, branch, rank). The kept count is constant per rank; hence another world size draws
    another subset. Steps that hide patches from rec (objectives.rec.mask) have one more group of segments, whose length
    goes with their number.
    """

    segments: Segments
    rate: float
    depth: int
    seed: int
    rank: int
    masked: Mapping[int, Segments] = field(default_factory=dict)  # by number of hidden patches

    def draw(self, step: int, hidden: int = 0) -> Tensor:
        """Draw (depth, 2, kept segments) int64: indices within each run of equally long segments, ascending."""
        branch, first, parts = np.arange(self.depth * BRANCHES)[:, None], 0, []
        segments = self.masked[hidden] if hidden else self.segments
        for (count, _), (kept, _) in zip(segments, kept_segments(segments, self.rate).segments, strict=True):
            place = np.arange(first, first + count)[None]
            order = np.argsort(
                hash_words(self.seed, _DROP_PATH_HASH, step, self.rank, branch, place), axis=1, kind="stable"
            )
            parts.append(np.sort(order[:, :kept], axis=1))
            first += count
        return torch.from_numpy(np.concatenate(parts, axis=1)).unflatten(0, (self.depth, BRANCHES))

    def __str__(self) -> str:
        pairs = zip(self.segments, kept_segments(self.segments, self.rate).segments, strict=True)
        return ", ".join(f"{kept} of {count} segments of {length} tokens" for (count, length), (kept, _) in pairs)


def drop_path_draws(config: Config, rank: int, world_size: int) -> DropPathDraws | None:
    """Return the draws for `model.trunk.drop_path`; None at rate 0.

    Raises UserError where a rank has so few segments that rounding leaves all of them in.
    """
    trunk = config.model.trunk
    if config.model.conv is not None or trunk.drop_path == 0:
        return None
    rows = RankBatchSizes.per_rank(config, world_size)
    segments = step_layout(config, rows).segments
    if kept_segments(segments, trunk.drop_path).segments == segments:
        counts = ", ".join(str(count) for count, _ in segments)
        raise UserError(
            f"model.trunk.drop_path={trunk.drop_path} drops none of a rank's {counts} segments: round((1 - rate) * "
            "count) of each length stay; raise the rate or the batch of a rank, or set it to 0"
        )
    masked = {hidden: layout.segments for hidden, (layout, _) in step_layouts(config, rows).items() if hidden}
    return DropPathDraws(segments, trunk.drop_path, trunk.depth, config.seed, rank, masked)
