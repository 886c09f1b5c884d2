"""Global positions -> good samples, decoded: order, bytes and pixels, whatever is bad in a corpus filled in.

    reader = SampleReader(config.data, config.system.loader, seed=0, caption="txt", rank=0, world_size=2)
    rows = reader.rows(np.array([24, 26, 28, 30]))
    images = reader.render(rows, ["image"], config.views)          # (4, 3, 256, 256) uint8

A bad sample's place is taken by another of the same stream and block (Order.substitute), found anew and
identically by every run; data/health.py counts it. What storage does not give is filled in the same way, and told from
what is bad: data/losses.py keeps it to the epoch in which it happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs import UserError
from configs.data import Pictures, Views
from configs.system import Loader as LoaderSettings
from data import corpus_of_a_run, headers, views
from data.corpus_of_a_run import Found
from data.decode import Decoder, Picture
from data.hashing import hash_text
from data.health import BadSample, Health
from data.loss_log import LossLog
from data.losses import Losses, StorageFails
from data.order import Order, Place
from data.patience import Unreadable
from data.shards import BadMember, Exchange, Sample, Shards
from data.storage import expand

_OVERHEAD_BYTES = 1 << 20  # of an encoded picture: metadata, colour profiles, a thumbnail
_PIXEL_BYTES = 8  # the most a pixel takes: four channels of 16 bits, not compressed
_MOST_LOGGED = 10_000  # left-out samples that each rank logs where they stop the run at its start
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
    far; `logs` are the files in which they and losses are written down. A run that goes on takes its corpus as
    `corpus_file` has it (data/corpus_of_a_run.py), and from beside it what was lost (data/loss_log.py). With an
    `exchange` (data/shards.py) ranks share the work of opening the corpus, and making one is a collective.
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
        corpus_file: Path | None = None,
        is_resumed: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        if data.streams % world_size:
            raise UserError(
                f"data.streams={data.streams} over {world_size} ranks: every rank reads whole streams, so the "
                "world size must divide data.streams; change data.streams (a new order) or the ranks"
            )
        self.rank, self.world_size, self.seed, self._max_pixels = rank, world_size, seed, data.max_pixels
        open_indexes = (data.streams // world_size + 1) * data.block_shards + 8
        known = _known(corpus_file, data, caption, exchange) if is_resumed and corpus_file else None
        self.shards = Shards(
            list(known.shards) if known else expand(data.train, loader.cache_dir), caption, loader.cache_dir,
            open_indexes, rank, world_size, exchange, loader.tries,
            np.array(list(known.shards.values()), np.int64) if known else None, seed,
        )  # fmt: skip
        left_out = known.bad if known else self.shards.bad
        self.health = Health(
            data.max_bad_share, int(self.shards.sizes.sum()), left_out, bad_log, self.shards.caption_hint
        )
        self._opened: set[int] = set()  # shards whose left-out samples are written down
        self._check_corpus()
        if corpus_file and not known:
            sizes = dict(zip(self.shards.names, self.shards.sizes.tolist(), strict=True))
            _keep(Found(sizes, left_out), corpus_file, data, caption, rank, exchange)
        self.order = Order(self.shards.sizes, data.streams, data.block_shards, seed)
        self._decoder = Decoder(loader.device, loader.threads, data.background)
        self._threads = ThreadPoolExecutor(loader.threads, thread_name_prefix="read")
        self._bad: set[tuple[int, int]] = set()  # (shard, sample) known to be bad: never tried again
        log = LossLog(corpus_file.with_name("lost_shards.jsonl"), rank) if corpus_file else None
        self.losses = Losses(self.shards.sizes, self.health, log)
        self.logs = [kept.lines for kept in (self.health, log) if kept is not None and kept.lines is not None]

    def positions(self, step: int, batch: int, offset: int = 0) -> np.ndarray:
        """Return this rank's global positions in a step of `batch` samples over all ranks.

        The step begins at offset + step * batch, a multiple of data.streams; `offset` is negative where the batch has
        grown during the run.
        """
        return offset + step * batch + np.arange(batch // self.world_size) * self.world_size + self.rank

    def rows(self, positions: np.ndarray) -> list[Row]:
        """A good row for each global position; whatever is bad or lost is filled, attempt by attempt.

        Raises TooManyBadSamples, and StorageFails where next to nothing can be read.
        """
        places = [self.order.locate(int(position)) for position in positions]
        rows: list[Row | None] = [None] * len(places)
        attempts = [0] * len(places)
        num_bad = sum((place.shard_idx, place.sample_idx) in self._bad for place in places)
        num_bad += self._fill_rows(rows, places, attempts, positions)
        # Checked before substitutes are read, which takes hours where all samples are bad.
        self.health.served(len(rows), num_bad)
        while None in rows:
            self._fill_rows(rows, places, attempts, positions)
        self.health.check_lost()
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

    def on_own_stream(self) -> AbstractContextManager[Any]:
        """Render on the decoder's CUDA stream inside the `with`, for batches made ahead of a step."""
        return self._decoder.on_own_stream()

    def record_event(self) -> torch.cuda.Event | None:
        """Return a CUDA event that fires when all crops rendered so far are ready; None on the CPU."""
        return self._decoder.record_event()

    def summary(self) -> str:
        """Return a line about the corpus: shards, samples, and how many the index left out, by reason."""
        return f"corpus: {self.shards.summary(self.health.left_out)}"

    def give_up(self) -> None:
        """Nobody waits for storage any more: before whoever waits for this reader is waited for."""
        self.shards.patience.end()

    def close(self) -> None:
        """Ends the threads."""
        self.give_up()
        self._threads.shutdown()
        self._decoder.close()

    def _check_corpus(self) -> None:
        """Raise TooManyBadSamples, after logging them, for too many left-out samples, and UserError for no sample."""
        if self.health.share > self.health.max_bad_share:
            self._log_left_out()
        self.health.check_share()
        if not self.health.corpus_size:
            raise UserError(
                f"data.train holds no sample ({self.shards.summary(self.health.left_out)}): a sample is a picture, "
                "with its caption where captions are read, under one name; python -m data.corpus writes such shards"
            )

    def _fill_rows(
        self, rows: list[Row | None], places: list[Place], attempts: list[int], positions: np.ndarray
    ) -> int:
        """Try to read a sample for every empty row; return how many were bad at their first attempt."""
        empty = [i for i, row in enumerate(rows) if row is None]
        for i in empty:
            places[i], attempts[i] = self._skip_known(int(positions[i]), places[i], attempts[i])
        num_bad = 0
        for i, found in zip(empty, self._try([places[i] for i in empty], int(positions[0])), strict=True):
            if isinstance(found, Row):
                rows[i] = found
            elif found is not None:
                num_bad += not attempts[i]
                self._note(places[i], found, int(positions[i]))
        return num_bad

    def _skip_known(self, position: int, place: Place, attempt: int) -> tuple[Place, int]:
        while (place.shard_idx, place.sample_idx) in self._bad or self.losses.holds(place, position):
            if self.losses.holds(place, position):
                self.losses.met(place, self.shards.key(place.shard_idx, place.sample_idx), position)
            attempt += 1
            if attempt > _MAX_ATTEMPTS:
                kind = StorageFails if self.losses.holds(place, position) else UserError
                raise kind(
                    f"position {position}: no readable sample among {_MAX_ATTEMPTS} of its stream "
                    f"(bad so far: {dict(self.health.counts)}); mend the corpus or the storage, or lower data.streams"
                    f"{self.shards.caption_hint(self.health.counts)}"
                )
            place = self.order.substitute(position, attempt)
        return place, attempt

    def _try(self, places: Sequence[Place], first: int) -> list[Row | str | None]:
        """Each place's row, the reason why its sample is bad, or None: it is lost. `first`: position of the batch."""
        read = list(self._threads.map(lambda place: self._read(place, first), places))
        decoded = iter(self._decoder.decode([item.image for item in read if isinstance(item, Sample)]))
        rows: list[Row | str | None] = []
        for place, item in zip(places, read, strict=True):
            found = next(decoded) if isinstance(item, Sample) else item
            if isinstance(item, Sample) and isinstance(found, Picture):
                rows.append(Row(place.epoch, item, found))
            else:
                rows.append(None if found is None else str(found))
        self._write_left_out({place.shard_idx for place, item in zip(places, read, strict=True) if item})
        return rows

    def _read(self, place: Place, first: int) -> Sample | str | None:
        if self.losses.holds(place, first):  # since another thread found out
            return None
        try:
            found = read_sample(self.shards, place.shard_idx, place.sample_idx, self._max_pixels, place.epoch)
        except Unreadable as error:
            self.losses.add(place, first, error)
            return None
        self.losses.storage_answered()
        return found

    def _note(self, place: Place, reason: str, position: int) -> None:
        self._bad.add((place.shard_idx, place.sample_idx))
        self.health.met(BadSample(self.shards.key(place.shard_idx, place.sample_idx), reason, position))

    def _log_left_out(self) -> None:
        """Log the samples that the index left out of this rank's share of the shards."""
        if self.health.lines is None:
            return
        for shard_idx in range(self.rank, len(self.shards.names), self.world_size):
            self._write_left_out({shard_idx})
            if self.health.num_logged > _MOST_LOGGED:
                return

    def _write_left_out(self, shards: set[int]) -> None:
        for shard_idx in shards - self._opened:
            with contextlib.suppress(OSError, UserError):  # it went away just now: another time
                index = self.shards.index(shard_idx)
                self.health.note_left_out(BadSample(f"{index.name}/{key}", reason, None) for key, reason in index.bad)
                self._opened.add(shard_idx)


def _known(path: Path, data: Pictures, caption: str | None, exchange: Exchange | None) -> Found | None:
    """The corpus as the run wrote it down, where every rank reads the same; else it is opened anew, by all of them."""
    read = corpus_of_a_run.read(path, data.train, caption)
    found, mark = read or (None, None)
    return found if exchange is None or set(exchange(mark)) == {mark} else None


def _keep(found: Found, path: Path, data: Pictures, caption: str | None, rank: int, exchange: Exchange | None) -> None:
    """Rank 0 writes down the corpus of a run that begins. Where it cannot, all ranks raise UserError."""
    trouble = ""
    if rank == 0:
        try:
            corpus_of_a_run.write(path, data.train, caption, found)
        except OSError as error:
            trouble = (
                f"{path} cannot be written ({error.strerror or error}): a run keeps the names and sizes of its shards, "
                "on which the order of its samples hangs; make room, or choose another system.run_dir"
            )
    if trouble := (exchange(trouble)[0] if exchange else trouble):
        raise UserError(trouble)


def read_sample(shards: Shards, shard_idx: int, sample_idx: int, max_pixels: int, epoch: int = 0) -> Sample | str:
    """The sample's bytes, or the reason why it is bad as far as a look at them shows. Raises Unreadable."""
    try:
        sample = shards.read(shard_idx, sample_idx, _PIXEL_BYTES * max_pixels + _OVERHEAD_BYTES, epoch)
    except BadMember as error:
        return str(error)
    return headers.refusal(sample.image, max_pixels) or sample


def sides(pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64."""
    return np.array([p.height for p in pictures], np.int64), np.array([p.width for p in pictures], np.int64)
