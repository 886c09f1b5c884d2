"""Step number -> pictures alone, in the crop that clip and rec see: for what is trained on reconstruction only.

    loader = PictureLoader(config.data, config.views, batch=256, seed=0, loader=config.system.loader)
    for batch in loader.iterate(start_step=1000):
        batch.images                    # (256, 3, 256, 256) uint8

Order, world sizes and bad samples as in data/loader.py: the same seed and corpus give the same pictures in the same
crops. Captions are neither read nor required.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.data import ImageView, Pictures, Views
from configs.system import Loader as LoaderSettings
from data.prefetch import Ahead
from data.reading import SampleReader
from data.shards import Exchange


@dataclass(frozen=True)
class PictureBatch:
    """One rank's share of one step."""

    images: torch.Tensor  # (B, 3, image_size, image_size) uint8, B = batch / world size
    step: int
    keys: tuple[str, ...]  # B sample keys, "shard/sample", after bad samples were replaced
    ready: torch.cuda.Event | None = None  # when images that a GPU decodes are there; None: they are


class PictureLoader:
    """The pictures of one rank. Arguments as of SampleReader; `batch` counts pictures over all ranks."""

    def __init__(
        self,
        data: Pictures,
        view: ImageView,
        batch: int,
        seed: int,
        loader: LoaderSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
        corpus_file: Path | None = None,
        is_resumed: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self.reader = SampleReader(
            data, loader, seed, None, rank=rank, world_size=world_size, bad_log=bad_log,
            corpus_file=corpus_file, is_resumed=is_resumed, exchange=exchange,
        )  # fmt: skip
        self.health = self.reader.health
        self._views, self._batch = Views(image_size=view.image_size, image_scale=view.image_scale), batch
        self._offset = 0
        self._ahead: Ahead[PictureBatch] = Ahead(self._made_ahead, loader.prefetch)

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer of `iterate` waited for batches since this was last read."""
        return self._ahead.wait_seconds

    def batch(self, step: int) -> PictureBatch:
        """Return this rank's pictures of a step, with the offset of the current iteration."""
        rows = self.reader.rows(self.reader.positions(step, self._batch, self._offset))
        images = self.reader.render(rows, ["image"], self._views)
        return PictureBatch(images, step, tuple(row.sample.key for row in rows))

    def iterate(self, start_step: int = 0, offset: int = 0) -> Iterator[PictureBatch]:
        """The batches from `start_step` on, without end, made ahead; `offset` as in data/loader.py."""
        self._ahead.close()
        self._offset = offset
        self.reader.losses.begin(offset + start_step * self._batch)
        return self._ahead.iterate(start_step)

    def close(self) -> None:
        """Ends the threads."""
        self.reader.give_up()
        self._ahead.close()
        self.reader.close()

    def _made_ahead(self, step: int) -> PictureBatch:
        with self.reader.on_own_stream():
            batch = self.batch(step)
        if not torch.cuda.is_available():
            return batch
        images = batch.images.pin_memory() if batch.images.is_cpu else batch.images
        return replace(batch, images=images, ready=self.reader.record_event())
