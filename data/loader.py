"""Loaders: step number -> batch of one rank, from order, bytes, decoding, views and masks, made ahead of the step.

A batch is a pure function of (config, corpus, step, rank, world size), and the batches of all ranks together
are the same for every world size that divides data.streams. With batch.clip=8 on 2 ranks, step 3 serves the
positions 24 26 28 30 on rank 0 and 25 27 29 31 on rank 1.

    loader = BatchLoader(config, encoder, rank=0, world_size=2, bad_log=run_dir / "bad_samples.jsonl")
    for batch in loader.iterate(start_step=1000): ...

    loader = ImageLoader(config.data, config.views, batch=256, seed=0, loader=config.system.loader)
    next(loader.iterate()).images                              # (256, 3, 256, 256) uint8

ImageLoader is for training on reconstruction alone: the same seed and corpus give the same images in the same crops as
those that clip and rec see. It neither reads nor requires captions. Bad samples are replaced by data/sample_reader.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from configs import Config
from configs.data import ImageData, ImageView, Views
from configs.run import LoaderSettings as LoaderSettings
from data.augment import view_names
from data.batch import Batch, RestartablePrefetcher
from data.masking import MaskSampler
from data.sample_reader import DecodedSample, SampleReader
from data.shards import GatherObjects


class Encoder(Protocol):
    """Captions -> token ids; data.captions.CaptionEncoder is one."""

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Encode n captions: (n, C) int64."""
        ...


class BatchLoader:
    """The training batches of one rank. Raises UserError for a corpus or world size that cannot serve them.

    `reader` has the corpus and its order, `bad_samples` the bad samples so far. With `gather_objects` (data/shards.py)
    ranks share the work of opening the corpus, and making a loader is a collective.
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
        gather_objects: GatherObjects | None = None,
    ) -> None:
        self.config, self.encoder = config, encoder
        self.reader = SampleReader(
            config.data, config.system.loader, config.seed, _caption(config), rank=rank, world_size=world_size,
            bad_log=bad_log, corpus_file=corpus_file, is_resumed=is_resumed, gather_objects=gather_objects,
        )  # fmt: skip
        self.bad_samples = self.reader.bad_samples
        self._masker = MaskSampler(
            config.masks,
            config.seed,
            config.views.global_size // config.model.patch_size,
            config.batch.ssl,
            config.data.streams,
        )
        self._offset = 0
        self._prefetcher: RestartablePrefetcher[Batch] = RestartablePrefetcher(
            self._make_ahead, config.system.loader.prefetch
        )

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer of `iterate` waited for batches since this was last read."""
        return self._prefetcher.wait_seconds

    def batch(self, step: int) -> Batch:
        """Return this rank's rows of a step, with the offset of the current iteration."""
        reader, sizes, config = self.reader, self.config.batch, self.config.views
        rows = reader.rows(reader.positions(step, sizes.clip, self._offset))
        num_ssl = sizes.ssl // reader.world_size
        masks, masked_idx = self._masker.masks(step, reader.rank, reader.world_size)
        names = view_names(config)
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
        """Iterate over batches from `start_step` on, without end, made ahead; one iteration at a time.

        Step s begins at position offset + s * batch.clip; the offset is not 0 after a resume with another batch.
        """
        self._prefetcher.close()
        self._offset = offset
        self.reader.unreadable.start_at(offset + start_step * self.config.batch.clip)
        return self._prefetcher.iterate(start_step)

    def close(self) -> None:
        """End the threads."""
        self.reader.stop_waiting()
        self._prefetcher.close()
        self.reader.close()

    def _make_ahead(self, step: int) -> Batch:
        with self.reader.on_own_stream():
            batch = self.batch(step)
        return replace(batch, ready=self.reader.record_event()).pinned() if torch.cuda.is_available() else batch

    def _captions(self, rows: Sequence[DecodedSample]) -> torch.Tensor:
        if _caption(self.config) is None:
            return torch.empty((0, self.config.model.text.context), dtype=torch.int64)
        return self.encoder.encode([row.sample.caption for row in rows])


def _caption(config: Config) -> str | None:
    """Return data.caption, or None without the clip objective: then captions are neither read nor required."""
    return config.data.caption if config.objectives.clip.weight else None


@dataclass(frozen=True)
class ImageBatch:
    """The images of one rank in one step."""

    images: torch.Tensor  # (B, 3, image_size, image_size) uint8, B = batch / world size
    step: int
    keys: tuple[str, ...]  # B sample keys, "shard/sample", after bad samples were replaced
    ready: torch.cuda.Event | None = None  # fires when images decoded on a GPU are complete; None: they are


class ImageLoader:
    """The training images of one rank, without captions.

    Arguments as of SampleReader; `batch` counts images over all ranks.
    """

    def __init__(
        self,
        data: ImageData,
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
        gather_objects: GatherObjects | None = None,
    ) -> None:
        self.reader = SampleReader(
            data, loader, seed, None, rank=rank, world_size=world_size, bad_log=bad_log,
            corpus_file=corpus_file, is_resumed=is_resumed, gather_objects=gather_objects,
        )  # fmt: skip
        self.bad_samples = self.reader.bad_samples
        self._views, self._batch = Views(image_size=view.image_size, image_scale=view.image_scale), batch
        self._offset = 0
        self._prefetcher: RestartablePrefetcher[ImageBatch] = RestartablePrefetcher(self._make_ahead, loader.prefetch)

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer of `iterate` waited for batches since this was last read."""
        return self._prefetcher.wait_seconds

    def batch(self, step: int) -> ImageBatch:
        """Return this rank's images of a step, with the offset of the current iteration."""
        rows = self.reader.rows(self.reader.positions(step, self._batch, self._offset))
        images = self.reader.render(rows, ["image"], self._views)
        return ImageBatch(images, step, tuple(row.sample.key for row in rows))

    def iterate(self, start_step: int = 0, offset: int = 0) -> Iterator[ImageBatch]:
        """Iterate over batches from `start_step` on, without end, made ahead; `offset` as of BatchLoader."""
        self._prefetcher.close()
        self._offset = offset
        self.reader.unreadable.start_at(offset + start_step * self._batch)
        return self._prefetcher.iterate(start_step)

    def close(self) -> None:
        """End the threads."""
        self.reader.stop_waiting()
        self._prefetcher.close()
        self.reader.close()

    def _make_ahead(self, step: int) -> ImageBatch:
        with self.reader.on_own_stream():
            batch = self.batch(step)
        if not torch.cuda.is_available():
            return batch
        images = batch.images.pin_memory() if batch.images.is_cpu else batch.images
        return replace(batch, images=images, ready=self.reader.record_event())
