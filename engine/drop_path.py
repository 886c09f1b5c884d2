"""Which segments every residual branch of the trunk sees in a step (model/packing.py): drawn on the host.

A pure function of (seed, step, block, branch, rank), so a resumed run draws what the first one would have drawn, and
nothing waits for a device. The kept count is constant per rank; hence another world size draws another subset. Steps
that hide patches from rec (objectives.rec.mask) have one more group of segments, whose length goes with their number.

    drops = DropPath(segments=((17, 257), (32, 37)), rate=0.3, depth=12, seed=0, rank=1)
    drops.draw(step=7)       # (12, 2, 34) int64: for each block and branch 12 of 17 segments, then 22 of 32, ascending
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from configs import Config, UserError
from data.hashing import hash_text, hash_words
from kernels.attention import Segments
from model.describe import step_layout, step_layouts
from model.packing import RankBatchSizes, kept_segments

BRANCHES = 2  # attention, MLP
_USE = hash_text("drop_path")  # what a hash is for: no other draw of the run has this word


@dataclass(frozen=True)
class DropPath:
    """The draws of one rank."""

    segments: Segments
    rate: float
    depth: int
    seed: int
    rank: int
    masked: Mapping[int, Segments] = field(default_factory=dict)  # by hidden patches of a rec image, where it has some

    def draw(self, step: int, hidden: int = 0) -> Tensor:
        """(depth, 2, kept segments) int64: numbers within each run of equally long segments, ascending."""
        branch, first, parts = np.arange(self.depth * BRANCHES)[:, None], 0, []
        segments = self.masked[hidden] if hidden else self.segments
        for (count, _), (kept, _) in zip(segments, kept_segments(segments, self.rate).segments, strict=True):
            place = np.arange(first, first + count)[None]
            order = np.argsort(hash_words(self.seed, _USE, step, self.rank, branch, place), axis=1, kind="stable")
            parts.append(np.sort(order[:, :kept], axis=1))
            first += count
        return torch.from_numpy(np.concatenate(parts, axis=1)).unflatten(0, (self.depth, BRANCHES))

    def __str__(self) -> str:
        pairs = zip(self.segments, kept_segments(self.segments, self.rate).segments, strict=True)
        return ", ".join(f"{kept} of {count} segments of {length} tokens" for (count, length), (kept, _) in pairs)


def drop_path(config: Config, rank: int, world_size: int) -> DropPath | None:
    """The draws that `model.trunk.drop_path` asks for; None at rate 0.

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
    return DropPath(segments, trunk.drop_path, trunk.depth, config.seed, rank, masked)
