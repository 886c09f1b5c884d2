"""Read training samples: global positions -> decoded samples, with bad ones replaced.

    reader = SampleReader(config.data, config.system.loader, seed=0, caption="txt", rank=0, world_size=2)
    rows = reader.rows(np.array([24, 26, 28, 30]))
    images = reader.render(rows, ["image"], config.views)          # (4, 3, 256, 256) uint8

A bad sample is replaced by another of the same stream and block (Order.substitute), found anew and identically by every
run, and counted by data/bad_samples.py. Unreadable samples are replaced in the same way, but only for the epoch in
which storage failed.
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
from configs.data import ImageData, Views
from configs.run import LoaderSettings as LoaderSettings
from data.augment import concatenate_views, draw_view
from data.bad_samples import BadSample, BadSampleTracker, StorageError, UnreadableLog, UnreadableShards
from data.decode import DecodedImage, Decoder
from data.hashing import hash_text
from data.order import CorpusRecord, Order, SampleLocation, read_corpus_record, write_corpus_record
from data.pillow_decoder import image_fault
from data.shards import BadMember, EncodedSample, GatherObjects, Shards
from data.storage import Unreadable, expand_patterns

_OVERHEAD_BYTES = 1 << 20  # of an encoded image: metadata, colour profiles, a thumbnail
_PIXEL_BYTES = 8  # the most a pixel takes: four channels of 16 bits, not compressed
_MAX_LOGGED = 10_000  # left-out samples that each rank logs where they stop the run at its start
_MAX_ATTEMPTS = 1000  # substitutes tried for one position: beyond, its stream has next to no readable sample


@dataclass(frozen=True)
class DecodedSample:
    """A good sample, decoded, in the epoch in which it is served."""

    epoch: int
    sample: EncodedSample
    image: DecodedImage


@dataclass
class _Slot:
    """One position of a batch: the sample now tried there, and the row once it is good."""

    position: int
    location: SampleLocation
    attempt: int = 0  # 0: the position's own sample
    row: DecodedSample | None = None


class SampleReader:
    """The training samples of one rank. Raises UserError for a corpus or world size that cannot serve them.

    `caption` is as of data.shards.Shards; None: captions are neither read nor required. `bad_samples` counts the bad
    samples so far; `logs` are the files that list bad and unreadable samples. A resumed run takes its corpus from
    `corpus_file` (data/order.py), and its unreadable shards from lost_shards.jsonl beside it (data/bad_samples.py).
    With `gather_objects` (data/shards.py) ranks share the work of opening the corpus, and making a reader is a
    collective.
    """

    def __init__(
        self,
        data: ImageData,
        loader: LoaderSettings,
        seed: int,
        caption: str | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
        corpus_file: Path | None = None,
        is_resumed: bool = False,
        gather_objects: GatherObjects | None = None,
    ) -> None:
        if data.streams % world_size:
            raise UserError(
                f"data.streams={data.streams} over {world_size} ranks: every rank reads whole streams, so the "
                "world size must divide data.streams; change data.streams (a new order) or the ranks"
            )
        self.rank, self.world_size, self.seed, self._max_pixels = rank, world_size, seed, data.max_pixels
        open_indexes = (data.streams // world_size + 1) * data.block_shards + 8
        record = _read_agreed_record(corpus_file, data, caption, gather_objects) if is_resumed and corpus_file else None
        self.shards = Shards(
            list(record.shards) if record else expand_patterns(data.train, loader.cache_dir), caption, loader.cache_dir,
            open_indexes, rank, world_size, gather_objects, loader.tries,
            np.array(list(record.shards.values()), np.int64) if record else None, seed,
        )  # fmt: skip
        left_out = record.bad if record else self.shards.bad
        self.bad_samples = BadSampleTracker(
            data.max_bad_share, int(self.shards.sizes.sum()), left_out, bad_log, self.shards.caption_hint
        )
        self._logged_shards: set[int] = set()  # whose left-out samples are logged
        self._check_corpus()
        if corpus_file and not record:
            sizes = dict(zip(self.shards.names, self.shards.sizes.tolist(), strict=True))
            _write_record(CorpusRecord(sizes, left_out), corpus_file, data, caption, rank, gather_objects)
        self.order = Order(self.shards.sizes, data.streams, data.block_shards, seed)
        self._decoder = Decoder(loader.device, loader.threads, data.background)
        self._threads = ThreadPoolExecutor(loader.threads, thread_name_prefix="read")
        self._bad: set[tuple[int, int]] = set()  # (shard, sample) known to be bad: never tried again
        log = UnreadableLog(corpus_file.with_name("lost_shards.jsonl"), rank) if corpus_file else None
        self.unreadable = UnreadableShards(self.shards.sizes, self.bad_samples, log)
        self.logs = [
            logger.file for logger in (self.bad_samples, log) if logger is not None and logger.file is not None
        ]

    def positions(self, step: int, batch: int, offset: int = 0) -> np.ndarray:
        """Return this rank's global positions in a step of `batch` samples over all ranks.

        The step begins at offset + step * batch, a multiple of data.streams; `offset` is negative where the batch has
        grown during the run.
        """
        return offset + step * batch + np.arange(batch // self.world_size) * self.world_size + self.rank

    def rows(self, positions: np.ndarray) -> list[DecodedSample]:
        """Return a good sample for each global position, bad and unreadable ones replaced.

        Raises TooManyBadSamples, and StorageError where next to nothing can be read.
        """
        slots = [_Slot(int(position), self.order.locate(int(position))) for position in positions]
        num_bad = sum(self._is_bad(slot.location) for slot in slots) + self._fill(slots)
        # Checked before substitutes are read, which takes hours where all samples are bad.
        self.bad_samples.count_served(len(slots), num_bad)
        while any(slot.row is None for slot in slots):
            self._fill(slots)
        self.bad_samples.check_unreadable()
        return [slot.row for slot in slots if slot.row is not None]

    def render(self, rows: Sequence[DecodedSample], names: Sequence[str], config: Views) -> torch.Tensor:
        """Render the named views, all of one size: (len(names) * len(rows), 3, size, size) uint8, view-major."""
        if not names:
            return self._decoder.empty_crops(config.local_size)
        keys = np.array([hash_text(row.sample.key) for row in rows], np.uint64)
        epochs = np.array([row.epoch for row in rows], np.int64)
        heights = np.array([row.image.height for row in rows], np.int64)
        widths = np.array([row.image.width for row in rows], np.int64)
        drawn = [draw_view(name, config, self.seed, keys, epochs, heights, widths) for name in names]
        return self._decoder.render([row.image for row in rows], concatenate_views(drawn))

    def on_own_stream(self) -> AbstractContextManager[Any]:
        """Render on the decoder's CUDA stream inside the `with`, for batches made ahead of a step."""
        return self._decoder.on_own_stream()

    def record_event(self) -> torch.cuda.Event | None:
        """Return a CUDA event that fires when all crops rendered so far are ready; None on the CPU."""
        return self._decoder.record_event()

    def summary(self) -> str:
        """Return a line about the corpus: shards, samples, and how many the index left out, by reason."""
        return f"corpus: {self.shards.summary(self.bad_samples.left_out)}"

    def stop_waiting(self) -> None:
        """End all waiting for storage, before joining a thread that uses this reader."""
        self.shards.retries.stop()

    def close(self) -> None:
        """End the threads."""
        self.stop_waiting()
        self._threads.shutdown()
        self._decoder.close()

    def _check_corpus(self) -> None:
        """Raise TooManyBadSamples, after logging them, for too many left-out samples, and UserError for no sample."""
        if self.bad_samples.share > self.bad_samples.max_bad_share:
            self._log_all_left_out()
        self.bad_samples.check_share()
        if not self.bad_samples.corpus_size:
            raise UserError(
                f"data.train holds no sample ({self.shards.summary(self.bad_samples.left_out)}): a sample is an image, "
                "with its caption where captions are read, under one name; python -m data.corpus writes such shards"
            )

    def _is_bad(self, location: SampleLocation) -> bool:
        return (location.shard_idx, location.sample_idx) in self._bad

    def _fill(self, slots: Sequence[_Slot]) -> int:
        """Try to read a sample for every empty slot; return how many were bad at their first attempt."""
        empty = [slot for slot in slots if slot.row is None]
        for slot in empty:
            self._skip_known(slot)
        num_bad = 0
        results = self._read_and_decode([slot.location for slot in empty], slots[0].position)
        for slot, result in zip(empty, results, strict=True):
            if isinstance(result, DecodedSample):
                slot.row = result
            elif result is not None:
                num_bad += not slot.attempt
                self._record_bad(slot, result)
        return num_bad

    def _skip_known(self, slot: _Slot) -> None:
        """Advance a slot to the next substitute until it is neither known as bad nor skipped as unreadable."""
        while (is_skipped := self.unreadable.is_skipped(slot.location, slot.position)) or self._is_bad(slot.location):
            if is_skipped:
                key = self.shards.key(slot.location.shard_idx, slot.location.sample_idx)
                self.unreadable.report_skipped(slot.location, key, slot.position)
            slot.attempt += 1
            if slot.attempt > _MAX_ATTEMPTS:
                kind = StorageError if is_skipped else UserError
                raise kind(
                    f"position {slot.position}: no readable sample among {_MAX_ATTEMPTS} of its stream "
                    f"(bad so far: {dict(self.bad_samples.counts)}); mend the corpus or the storage, or lower "
                    f"data.streams{self.shards.caption_hint(self.bad_samples.counts)}"
                )
            slot.location = self.order.substitute(slot.position, slot.attempt)

    def _read_and_decode(self, locations: Sequence[SampleLocation], first: int) -> list[DecodedSample | str | None]:
        """Return for each location a row, the reason why its sample is bad, or None where it is unreadable.

        `first` is the first position of the batch, from which unreadable samples are skipped.
        """
        encoded = list(self._threads.map(lambda location: self._read(location, first), locations))
        decoded = iter(self._decoder.decode([item.image for item in encoded if isinstance(item, EncodedSample)]))
        rows: list[DecodedSample | str | None] = []
        for location, item in zip(locations, encoded, strict=True):
            result = next(decoded) if isinstance(item, EncodedSample) else item
            if isinstance(item, EncodedSample) and isinstance(result, DecodedImage):
                rows.append(DecodedSample(location.epoch, item, result))
            else:
                rows.append(None if result is None else str(result))
        self._log_left_out({location.shard_idx for location, item in zip(locations, encoded, strict=True) if item})
        return rows

    def _read(self, location: SampleLocation, first: int) -> EncodedSample | str | None:
        if self.unreadable.is_skipped(location, first):  # since another thread failed to read it
            return None
        try:
            result = read_sample(self.shards, location.shard_idx, location.sample_idx, self._max_pixels, location.epoch)
        except Unreadable as error:
            self.unreadable.add(location, first, error)
            return None
        self.unreadable.count_success()
        return result

    def _record_bad(self, slot: _Slot, reason: str) -> None:
        shard_idx, sample_idx = slot.location.shard_idx, slot.location.sample_idx
        self._bad.add((shard_idx, sample_idx))
        self.bad_samples.record(BadSample(self.shards.key(shard_idx, sample_idx), reason, slot.position))

    def _log_all_left_out(self) -> None:
        """Log the samples that the index left out of this rank's part of the shards."""
        if self.bad_samples.file is None:
            return
        for shard_idx in range(self.rank, len(self.shards.names), self.world_size):
            self._log_left_out({shard_idx})
            if self.bad_samples.num_logged > _MAX_LOGGED:
                return

    def _log_left_out(self, shards: set[int]) -> None:
        for shard_idx in shards - self._logged_shards:
            with contextlib.suppress(OSError, UserError):  # the shard has just vanished: logged another time
                index = self.shards.index(shard_idx)
                bad = (BadSample(f"{index.name}/{key}", reason, None) for key, reason in index.bad)
                self.bad_samples.log_left_out(bad)
                self._logged_shards.add(shard_idx)


def _read_agreed_record(
    path: Path, data: ImageData, caption: str | None, gather_objects: GatherObjects | None
) -> CorpusRecord | None:
    """Read the run's corpus record; None where it is missing or ranks read different ones. A collective."""
    read = read_corpus_record(path, data.train, caption)
    record, checksum = read or (None, None)
    return record if gather_objects is None or set(gather_objects(checksum)) == {checksum} else None


def _write_record(
    record: CorpusRecord,
    path: Path,
    data: ImageData,
    caption: str | None,
    rank: int,
    gather_objects: GatherObjects | None,
) -> None:
    """Write the corpus record of a new run on rank 0. Where that fails, all ranks raise UserError. A collective."""
    trouble = ""
    if rank == 0:
        try:
            write_corpus_record(path, data.train, caption, record)
        except OSError as error:
            trouble = (
                f"{path} cannot be written ({error.strerror or error}): a run keeps the names and sizes of its shards, "
                "on which the order of its samples depends; make room, or choose another system.run_dir"
            )
    if trouble := (gather_objects(trouble)[0] if gather_objects else trouble):
        raise UserError(trouble)


def read_sample(
    shards: Shards, shard_idx: int, sample_idx: int, max_pixels: int, epoch: int = 0
) -> EncodedSample | str:
    """Read a sample's bytes; return the reason instead where they show that it is bad. Raises Unreadable."""
    try:
        sample = shards.read(shard_idx, sample_idx, _PIXEL_BYTES * max_pixels + _OVERHEAD_BYTES, epoch)
    except BadMember as error:
        return str(error)
    return image_fault(sample.image, max_pixels) or sample
