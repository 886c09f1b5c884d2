"""Global positions -> good samples, decoded: order, bytes and pixels, whatever is bad in a corpus filled in.

    reader = SampleReader(config.data, config.system.loader, seed=0, caption="txt", rank=0, world_size=2)
    rows = reader.rows(np.array([24, 26, 28, 30]))
    images = reader.render(rows, ["image"], config.views)          # (4, 3, 256, 256) uint8

A bad sample's place is taken by another of the same stream and block (Order.substitute), found anew and
identically by every run; data/health.py counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs import UserError
from configs.data import Pictures, Views
from configs.system import Loader as LoaderSettings
from data import headers, views
from data.decode import Decoder, Picture
from data.hashing import hash_text
from data.health import BadSample, Health
from data.order import Order, Place
from data.shards import BadCaption, Exchange, Sample, Shards
from data.storage import expand

_MAX_ATTEMPTS = 1000  # fills tried for one position: beyond, its stream has next to no readable sample


@dataclass(frozen=True)
class Row:
    """A good sample, decoded, at its place in the epoch."""

    epoch: int
    sample: Sample
    picture: Picture


class SampleReader:
    """The training samples of one rank. Raises UserError for a corpus or world size that cannot serve them.

    `caption` is as of data.shards.Shards; None: captions are neither read nor required. `health` has the bad samples so
    far. With an `exchange` (data/shards.py) ranks share the work of opening the corpus, and making one is a collective.
    """

    def __init__(
        self,
        data: Pictures,
        loader: LoaderSettings,
        seed: int,
        caption: str | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        if data.streams % world_size:
            raise UserError(
                f"data.streams={data.streams} over {world_size} ranks: every rank reads whole streams, so the "
                "world size must divide data.streams; change data.streams (a new order) or the ranks"
            )
        self.rank, self.world_size, self.seed, self._max_pixels = rank, world_size, seed, data.max_pixels
        open_indexes = (data.streams // world_size + 1) * data.block_shards + 8
        names = expand(data.train, loader.cache_dir)
        self.shards = Shards(names, caption, loader.cache_dir, open_indexes, rank, world_size, exchange)
        self.health = Health(data.max_bad_share, int(self.shards.sizes.sum()), self.shards.bad, bad_log)
        self.order = Order(self.shards.sizes, data.streams, data.block_shards, seed)
        self._decoder = Decoder(loader.device, loader.threads)
        self._threads = ThreadPoolExecutor(loader.threads, thread_name_prefix="read")
        self._bad: set[tuple[int, int]] = set()  # (shard, sample) known to be bad: never tried again
        self._opened: set[int] = set()  # shards whose left-out samples are written down

    def positions(self, step: int, batch: int) -> np.ndarray:
        """This rank's global positions in a step of `batch` samples over all ranks."""
        return step * batch + np.arange(batch // self.world_size) * self.world_size + self.rank

    def rows(self, positions: np.ndarray) -> list[Row]:
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

    def render(self, rows: Sequence[Row], names: Sequence[str], config: Views) -> torch.Tensor:
        """The named views of one size, view-major."""
        if not names:
            return self._decoder.nothing(config.local_size)
        keys = np.array([hash_text(row.sample.key) for row in rows], np.uint64)
        epochs = np.array([row.epoch for row in rows], np.int64)
        pictures = [row.picture for row in rows]
        height, width = sides(pictures)
        drawn = [views.draw(name, config, self.seed, keys, epochs, height, width) for name in names]
        return self._decoder.render(pictures, views.concatenate(drawn))

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()
        self._decoder.close()

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
        read = list(self._threads.map(self._read, places))
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
        return read_sample(self.shards, place.shard_idx, place.sample_idx, self._max_pixels)

    def _note(self, place: Place, reason: str, position: int) -> None:
        self._bad.add((place.shard_idx, place.sample_idx))
        key = self.shards.index(place.shard_idx).key(place.sample_idx)
        self.health.met(BadSample(key, reason, position))

    def _write_left_out(self, shards: set[int]) -> None:
        for shard_idx in shards - self._opened:
            index = self.shards.index(shard_idx)
            self.health.note_left_out(BadSample(f"{index.name}/{key}", reason, None) for key, reason in index.bad)
            self._opened.add(shard_idx)


def read_sample(shards: Shards, shard_idx: int, sample_idx: int, max_pixels: int) -> Sample | str:
    """The sample's bytes, or the reason why it is bad as far as a look at them shows."""
    try:
        sample = shards.read(shard_idx, sample_idx)
    except BadCaption as error:
        return str(error)
    return headers.refusal(sample.image, max_pixels) or sample


def sides(pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64."""
    return np.array([p.height for p in pictures], np.int64), np.array([p.width for p in pictures], np.int64)
