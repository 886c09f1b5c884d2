"""Step number -> Batch: order, bytes, decode, views and masks put together, made ahead of the step.

A batch is a pure function of (config, corpus, step, rank, world size), and the batches of all ranks together
are the same for every world size that divides data.streams. With batch.clip=8 on 2 ranks, step 3 serves the
positions 24 26 28 30 on rank 0 and 25 27 29 31 on rank 1.

    loader = Loader(config, encoder, rank=0, world_size=2, bad_log=run_dir / "bad_samples.jsonl")
    for batch in loader.iterate(start_step=1000): ...

A bad sample's place is taken by another of the same stream and block (Order.substitute), found anew and
identically by every run; data/health.py counts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from configs import Config, UserError
from data import headers, views
from data.batch import Batch
from data.decode import Decoder, Picture
from data.hashing import hash_text
from data.health import BadSample, Health
from data.masking import Masker
from data.order import Order, Place
from data.prefetch import Prefetcher
from data.shards import BadCaption, Exchange, Sample, Shards
from data.storage import expand

_MAX_ATTEMPTS = 1000  # fills tried for one position: beyond, its stream has next to no readable sample


class Encoder(Protocol):
    """Captions -> token ids; data.captions.CaptionEncoder is one."""

    def encode(self, captions: list[str]) -> torch.Tensor:
        """(n, C) int64."""
        ...


@dataclass(frozen=True)
class Row:
    """A good sample, decoded, at its place in the epoch."""

    epoch: int
    sample: Sample
    picture: Picture


class Loader:
    """The training batches of one rank. Raises UserError for a corpus or world size that cannot serve it.

    `health` has the bad samples so far; `wait_seconds` the time the consumer of `iterate` waited. With an `exchange`
    (data/shards.py) ranks share the work of opening the corpus, and making a loader is a collective.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        *,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        streams, cache_dir = config.data.streams, config.system.loader.cache_dir
        if streams % world_size:
            raise UserError(
                f"data.streams={streams} over {world_size} ranks: every rank reads whole streams, so the "
                "world size must divide data.streams; change data.streams (a new order) or the ranks"
            )
        self.config, self.encoder, self.rank, self.world_size = config, encoder, rank, world_size
        open_indexes = (streams // world_size + 1) * config.data.block_shards + 8
        names = expand(config.data.train, cache_dir)
        self.shards = Shards(names, _caption(config), cache_dir, open_indexes, rank, world_size, exchange)
        self.health = Health(config.data.max_bad_share, int(self.shards.sizes.sum()), self.shards.bad, bad_log)
        self.order = Order(self.shards.sizes, streams, config.data.block_shards, config.seed)
        self._masker = Masker(
            config.masks,
            config.seed,
            config.views.global_size // config.model.patch_size,
            config.batch.ssl,
            streams,
        )
        self._decoder = Decoder(config.system.loader.device, config.system.loader.threads)
        self._readers = ThreadPoolExecutor(config.system.loader.threads, thread_name_prefix="read")
        self._prefetcher: Prefetcher[Batch] | None = None
        self._bad: set[tuple[int, int]] = set()  # (shard, sample) known to be bad: never tried again
        self._opened: set[int] = set()  # shards whose left-out samples are written down

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer waited for batches since this was last read."""
        if self._prefetcher is None:
            return 0.0
        waited, self._prefetcher.wait_seconds = self._prefetcher.wait_seconds, 0.0
        return waited

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        sizes = self.config.batch
        local = np.arange(sizes.clip // self.world_size)
        rows = self._rows(step * sizes.clip + local * self.world_size + self.rank)
        num_ssl = sizes.ssl // self.world_size
        masks, masked_idx = self._masker.masks(step, self.rank, self.world_size)
        names = views.names(self.config.views)
        return Batch(
            images=self._render(rows, ["image"]),
            captions=self._captions(rows),
            global_crops=self._render(rows[:num_ssl], names[:2]),
            local_crops=self._render(rows[:num_ssl], names[2:]),
            masks=torch.from_numpy(masks),
            masked_idx=torch.from_numpy(masked_idx),
            step=step,
            keys=tuple(row.sample.key for row in rows),
        )

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, without end, made ahead; one iteration at a time."""
        self._stop_prefetching()
        self._prefetcher = Prefetcher(self._batch_ahead, start_step, self.config.system.loader.prefetch)
        return self._prefetcher

    def close(self) -> None:
        """Ends the threads."""
        self._stop_prefetching()
        self._readers.shutdown()
        self._decoder.close()

    def _batch_ahead(self, step: int) -> Batch:
        batch = self.batch(step)
        return batch.pinned() if torch.cuda.is_available() else batch

    def _stop_prefetching(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _rows(self, positions: np.ndarray) -> list[Row]:
        """A good row for each global position; whatever is bad is filled, attempt by attempt."""
        places = [self.order.locate(int(position)) for position in positions]
        rows: list[Row | None] = [None] * len(places)
        attempts = [0] * len(places)
        while empty := [i for i, row in enumerate(rows) if row is None]:
            for i in empty:
                places[i], attempts[i] = self._skip_known(int(positions[i]), places[i], attempts[i])
            for i, found in zip(empty, self._try([places[i] for i in empty]), strict=True):
                if isinstance(found, Row):
                    rows[i] = found
                else:
                    self._note(places[i], found, int(positions[i]))
        self.health.served(len(rows), sum(attempt > 0 for attempt in attempts))
        return [row for row in rows if row is not None]

    def _skip_known(self, position: int, place: Place, attempt: int) -> tuple[Place, int]:
        while (place.shard_idx, place.sample_idx) in self._bad:
            attempt += 1
            if attempt > _MAX_ATTEMPTS:
                raise UserError(
                    f"position {position}: no readable sample among {_MAX_ATTEMPTS} of its stream "
                    f"(bad so far: {dict(self.health.counts)}); mend the corpus or lower data.streams"
                )
            place = self.order.substitute(position, attempt)
        return place, attempt

    def _try(self, places: Sequence[Place]) -> list[Row | str]:
        """Each place's row, or the reason why its sample is bad."""
        self._write_left_out({place.shard_idx for place in places})
        read = list(self._readers.map(self._read, places))
        decoded = iter(self._decoder.decode([item.image for item in read if isinstance(item, Sample)]))
        rows: list[Row | str] = []
        for place, item in zip(places, read, strict=True):
            found = item if isinstance(item, str) else next(decoded)
            if isinstance(item, Sample) and isinstance(found, Picture):
                rows.append(Row(place.epoch, item, found))
            else:
                rows.append(str(found))
        return rows

    def _read(self, place: Place) -> Sample | str:
        return read_sample(self.shards, place.shard_idx, place.sample_idx, self.config.data.max_pixels)

    def _note(self, place: Place, reason: str, position: int) -> None:
        self._bad.add((place.shard_idx, place.sample_idx))
        key = self.shards.index(place.shard_idx).key(place.sample_idx)
        self.health.met(BadSample(key, reason, position))

    def _write_left_out(self, shards: set[int]) -> None:
        for shard_idx in shards - self._opened:
            index = self.shards.index(shard_idx)
            self.health.note_left_out(BadSample(f"{index.name}/{key}", reason, None) for key, reason in index.bad)
            self._opened.add(shard_idx)

    def _render(self, rows: Sequence[Row], names: Sequence[str]) -> torch.Tensor:
        """The named views of one size, view-major."""
        keys = np.array([hash_text(row.sample.key) for row in rows], np.uint64)
        epochs = np.array([row.epoch for row in rows], np.int64)
        pictures = [row.picture for row in rows]
        height, width = sides(pictures)
        if not names:
            return self._decoder.nothing(self.config.views.local_size)
        drawn = [views.draw(n, self.config.views, self.config.seed, keys, epochs, height, width) for n in names]
        return self._decoder.render(pictures, views.concatenate(drawn))

    def _captions(self, rows: Sequence[Row]) -> torch.Tensor:
        if _caption(self.config) is None:
            return torch.empty((0, self.config.model.text.context), dtype=torch.int64)
        return self.encoder.encode([row.sample.caption for row in rows])


def read_sample(shards: Shards, shard_idx: int, sample_idx: int, max_pixels: int) -> Sample | str:
    """The sample's bytes, or the reason why it is bad as far as a look at them shows."""
    try:
        sample = shards.read(shard_idx, sample_idx)
    except BadCaption as error:
        return str(error)
    return headers.refusal(sample.image, max_pixels) or sample


def _caption(config: Config) -> str | None:
    """Without the clip objective captions are neither read nor required."""
    return config.data.caption if config.objectives.clip.weight else None


def sides(pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.height for p in pictures], np.int64), np.array([p.width for p in pictures], np.int64)
