"""Step number -> Batch: order, bytes, decode, views and masks put together, made ahead of the step.

A batch is a pure function of (config, corpus, step, rank, world size), and the batches of all ranks together
are the same for every world size that divides data.streams. With batch.clip=8 on 2 ranks, step 3 serves the
positions 24 26 28 30 on rank 0 and 25 27 29 31 on rank 1.

    loader = Loader(config, encoder, rank=0, world_size=2, bad_log=run_dir / "bad_samples.jsonl")
    for batch in loader.iterate(start_step=1000): ...

What is bad in the corpus data/reading.py fills in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from configs import Config
from data import views
from data.batch import Batch
from data.masking import Masker
from data.prefetch import Ahead
from data.reading import Row, SampleReader
from data.shards import Exchange


class Encoder(Protocol):
    """Captions -> token ids; data.captions.CaptionEncoder is one."""

    def encode(self, captions: list[str]) -> torch.Tensor:
        """(n, C) int64."""
        ...


class Loader:
    """The training batches of one rank. Raises UserError for a corpus or world size that cannot serve it.

    `reader` has the corpus and its order, `health` the bad samples so far. With an `exchange` (data/shards.py) ranks
    share the work of opening the corpus, and making a loader is a collective.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        *,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
        corpus_file: Path | None = None,
        is_resumed: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self.config, self.encoder = config, encoder
        self.reader = SampleReader(
            config.data, config.system.loader, config.seed, _caption(config), rank=rank, world_size=world_size,
            bad_log=bad_log, corpus_file=corpus_file, is_resumed=is_resumed, exchange=exchange,
        )  # fmt: skip
        self.health = self.reader.health
        self._masker = Masker(
            config.masks,
            config.seed,
            config.views.global_size // config.model.patch_size,
            config.batch.ssl,
            config.data.streams,
        )
        self._offset = 0
        self._ahead: Ahead[Batch] = Ahead(self._made_ahead, config.system.loader.prefetch)

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer of `iterate` waited for batches since this was last read."""
        return self._ahead.wait_seconds

    def batch(self, step: int) -> Batch:
        """Return this rank's rows of a step, with the offset of the current iteration."""
        reader, sizes, config = self.reader, self.config.batch, self.config.views
        rows = reader.rows(reader.positions(step, sizes.clip, self._offset))
        num_ssl = sizes.ssl // reader.world_size
        masks, masked_idx = self._masker.masks(step, reader.rank, reader.world_size)
        names = views.names(config)
        return Batch(
            images=reader.render(rows, ["image"], config),
            captions=self._captions(rows),
            global_crops=reader.render(rows[:num_ssl], names[:2], config),
            local_crops=reader.render(rows[:num_ssl], names[2:], config),
            masks=torch.from_numpy(masks),
            masked_idx=torch.from_numpy(masked_idx),
            step=step,
            keys=tuple(row.sample.key for row in rows),
        )

    def iterate(self, start_step: int = 0, offset: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, without end, made ahead; one iteration at a time.

        Step s begins at position offset + s * batch.clip; the offset is not 0 after a resume with another batch.
        """
        self._ahead.close()
        self._offset = offset
        self.reader.losses.begin(offset + start_step * self.config.batch.clip)
        return self._ahead.iterate(start_step)

    def close(self) -> None:
        """Ends the threads."""
        self.reader.give_up()
        self._ahead.close()
        self.reader.close()

    def _made_ahead(self, step: int) -> Batch:
        with self.reader.on_own_stream():
            batch = self.batch(step)
        return replace(batch, ready=self.reader.record_event()).pinned() if torch.cuda.is_available() else batch

    def _captions(self, rows: Sequence[Row]) -> torch.Tensor:
        if _caption(self.config) is None:
            return torch.empty((0, self.config.model.text.context), dtype=torch.int64)
        return self.encoder.encode([row.sample.caption for row in rows])


def _caption(config: Config) -> str | None:
    """Without the clip objective captions are neither read nor required."""
    return config.data.caption if config.objectives.clip.weight else None
