"""One rank's images per step, and which of them each objective has.

    rows = Rows.per_rank(config, world_size=2)     # clip 32, ssl 8, rec 8, rec_start 0

All batch sizes of a config are global; the model is built for one rank's share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs import Config, UserError


@dataclass(frozen=True)
class Rows:
    """One rank's images per step: `clip` rows; ssl has the leading `ssl`, rec `rec` from `rec_start` on.

    The clip rows pass in `micro_batches` equal parts; one of them, number `shared`, brings ssl and rec along.
    """

    clip: int
    ssl: int
    rec: int
    rec_start: int
    micro_batches: int = 1

    @classmethod
    def per_rank(cls, config: Config, world_size: int) -> Rows:
        """The share of one of `world_size` ranks. Raises UserError where they do not divide the batch."""
        for key in ("clip", "ssl", "rec"):
            rows = getattr(config.batch, key)
            if rows % world_size:
                raise UserError(
                    f"batch.{key}={rows} is not a multiple of the {world_size} ranks: all ranks take as many "
                    f"rows; change batch.{key} or the number of ranks"
                )
        clip, ssl, rec = (getattr(config.batch, key) // world_size for key in ("clip", "ssl", "rec"))
        parts = config.system.clip.micro_batches
        if clip % parts:
            raise UserError(
                f"system.clip.micro_batches={parts} does not divide a rank's {clip} rows (batch.clip="
                f"{config.batch.clip} on {world_size} ranks): parts are equal; change it or the number of ranks"
            )
        return cls(clip, ssl, rec, ssl if config.batch.layout == "disjoint" else 0, parts)

    @property
    def part(self) -> int:
        """Clip rows of one micro-batch."""
        return self.clip // self.micro_batches

    @property
    def shared(self) -> int:
        """The micro-batch that holds the rec rows."""
        return self.rec_start // self.part if self.rec else 0
