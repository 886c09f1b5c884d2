"""Sample order: position -> sample as a pure function of (shard sizes, seed), and digests that tell two orders apart.

    order = Order([100, 100, 80], streams=2, block_shards=2, seed=0)
    order.locate(10**9)            # SampleLocation(epoch=..., shard_idx=..., sample_idx=...), without iterating

Position g belongs to stream g mod C and is number g // C there. A stream is infinite: its epoch e runs
through the shards dealt to it in epoch e, block by block, the samples of a block permuted. Each epoch deals
every shard to one stream, so over all streams an epoch holds every sample exactly once, however uneven the
shards are.

Why: the whole state of the data is one integer. Resume is a jump, another world size is a division, and rank
r of W (W divides C) serves the positions g = r mod W, so each shard is read by one rank at a time.

Since the order depends on the names and sizes of the shards, a run records them at its start:

    runs/NAME/corpus.json    {"of": {"train": ["corpus/*.tar"], "caption": "txt"},
                              "shards": {"corpus/00000.tar": 1000, ...}, "bad": {"missing caption": 3}}

A resumed run takes them from there: a shard that has vanished since is skipped and counted like one that vanishes
during the run, and one that was added since is left out; either would otherwise change every later batch. It also
saves opening every index again.

The digest of the samples trained on is the same for any world size: each step adds up the hashes of its sample keys
over all ranks, and steps are chained, so that their order counts.

    own = sum_key_hashes(["00000/000001", "00003/000017"])         # of one rank's rows
    chain_digest("", [own + others, ...])                          # "5f3c..." after so many steps
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs import UserError
from data.durable_files import write_atomic
from data.hashing import Words, hash_text, hash_words, permutation

Ints = NDArray[np.int64]
_DEAL, _BLOCK, _SUBSTITUTE = 1, 2, 3  # purposes of hashes
_BLOCK_SUBSTITUTES = 16  # substitutes from the position's own block (its shards are open) before the whole stream epoch
_TABLE_ENTRIES = 1 << 16  # (epoch, shard) pairs dealt at once when searching for a far epoch
NUM_COMPARED_SAMPLES = 256  # samples after the cursor whose locations are compared on a resume


@dataclass(frozen=True)
class SampleLocation:
    """A sample: shard and number within the shard, both from 0, in the epoch in which its stream serves it."""

    epoch: int
    shard_idx: int
    sample_idx: int


@dataclass(frozen=True)
class _ShardBlock:
    """Consecutive shards of one stream epoch with their samples in the order they are served."""

    epoch: int
    first: int  # number, within the stream, of the block's first sample
    shard_idx: Ints
    sample_idx: Ints

    def __len__(self) -> int:
        return len(self.shard_idx)

    def contains(self, number: int) -> bool:
        return self.first <= number < self.first + len(self)

    def location(self, idx: int) -> SampleLocation:
        return SampleLocation(self.epoch, int(self.shard_idx[idx]), int(self.sample_idx[idx]))


class Order:
    """The infinite sample sequence of a corpus.

    `shard_sizes` counts the usable samples of each shard; a shard with none is never dealt. Raises UserError
    when fewer than `streams` shards hold samples.
    """

    def __init__(self, shard_sizes: Sequence[int] | Ints, streams: int, block_shards: int, seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.streams, self.block_shards, self.seed = streams, block_shards, seed
        self._nonempty = np.flatnonzero(self.sizes)
        if len(self._nonempty) < streams:
            raise UserError(
                f"data.train: {len(self._nonempty)} of {len(self.sizes)} shards hold usable samples but "
                f"data.streams={streams}: every stream reads shards of its own; lower data.streams or write "
                "the corpus in more shards"
            )
        self._current: dict[int, _ShardBlock] = {}  # by stream: positions mostly come in sequence
        self._table_epochs = max(1, _TABLE_ENTRIES // len(self._nonempty))
        self._table_starts = [np.zeros(streams, np.int64)]  # number at which each stream enters each epoch table
        self._table = lru_cache(4)(self._make_table)
        self._deal = lru_cache(8)(self._make_deal)
        self._block = lru_cache(2 * streams + 4)(self._make_block)

    def locate(self, position: int) -> SampleLocation:
        """Return the sample at a global position (0, 1, 2, ... without end)."""
        stream, number = position % self.streams, position // self.streams
        block = self._find(stream, number)
        return block.location(number - block.first)

    def locate_many(self, positions: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Return (epoch, shard_idx, sample_idx) of each position, each int64 of the positions' length."""
        found = [self.locate(int(position)) for position in np.asarray(positions)]
        table = np.array([(at.epoch, at.shard_idx, at.sample_idx) for at in found], np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """Return the substitute for a bad sample: drawn from the same block, after 16 attempts from the stream's epoch.

        A pure function of (seed, position, attempt). It may be a bad sample too: then the next attempt is made.
        """
        assert attempt >= 1, "attempt 0 is the position's own sample"
        stream, number = position % self.streams, position // self.streams
        block = self._find(stream, number)
        draw = int(hash_words(self.seed, _SUBSTITUTE, position, attempt)[0])
        if attempt > _BLOCK_SUBSTITUTES:
            first, length = self._epoch_span(stream, block.epoch)
            number = first + draw % length
            block = self._block_at(stream, block.epoch, first, number)
            return block.location(number - block.first)
        return block.location(draw % len(block))

    def _find(self, stream: int, number: int) -> _ShardBlock:
        block = self._current.get(stream)
        if block is None or not block.contains(number):
            epoch, first = self._epoch_of(stream, number)
            block = self._current[stream] = self._block_at(stream, epoch, first, number)
        return block

    def _block_at(self, stream: int, epoch: int, epoch_first: int, number: int) -> _ShardBlock:
        """Return the block with sample `number`, in the stream epoch that begins at `epoch_first`."""
        sizes = self.sizes[self._deal(epoch)[stream :: self.streams]]
        ends = epoch_first + np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.block_shards)))
        block_idx = int(np.searchsorted(ends, number, side="right"))
        return self._block(stream, epoch, block_idx, int(ends[block_idx - 1]) if block_idx else epoch_first)

    def _make_block(self, stream: int, epoch: int, block_idx: int, first: int) -> _ShardBlock:
        shards = self._deal(epoch)[stream :: self.streams][block_idx * self.block_shards :][: self.block_shards]
        shard_idx = np.repeat(shards, self.sizes[shards])
        sample_idx = np.concatenate([np.arange(size) for size in self.sizes[shards]])
        shuffled = permutation(len(shard_idx), self.seed, _BLOCK, epoch, stream, block_idx)
        return _ShardBlock(epoch, first, shard_idx[shuffled], sample_idx[shuffled])

    def _make_deal(self, epoch: int) -> Ints:
        """Shuffle the shards that have samples for an epoch: entry j goes to stream j mod C."""
        return self._deal_many(np.array([epoch]))[0]

    def _deal_many(self, epochs: Ints) -> Ints:
        words = hash_words(self.seed, _DEAL, epochs[:, None], np.arange(len(self._nonempty))[None, :])
        return self._nonempty[np.argsort(words, axis=1, kind="stable")]

    def _make_table(self, table_idx: int) -> Ints:
        """Return the number at which each stream leaves each epoch of a table, (epochs, streams)."""
        epochs = table_idx * self._table_epochs + np.arange(self._table_epochs)
        sizes = self.sizes[self._deal_many(epochs)]
        lengths = np.stack([sizes[:, s :: self.streams].sum(1) for s in range(self.streams)], axis=1)
        return self._table_starts[table_idx] + np.cumsum(lengths, axis=0)

    def _epoch_of(self, stream: int, number: int) -> tuple[int, int]:
        """Return the stream's epoch that holds its sample `number`, and the number of that epoch's first sample."""
        while self._table_starts[-1][stream] <= number:
            self._table_starts.append(self._table(len(self._table_starts) - 1)[-1])
        starts = np.array([start[stream] for start in self._table_starts])
        table_idx = int(np.searchsorted(starts, number, side="right")) - 1
        row = int(np.searchsorted(self._table(table_idx)[:, stream], number, side="right"))
        epoch = table_idx * self._table_epochs + row
        return epoch, self._epoch_span(stream, epoch)[0]

    def _epoch_span(self, stream: int, epoch: int) -> tuple[int, int]:
        """Return (number of the first sample, number of samples) of a stream's epoch."""
        table_idx, row = divmod(epoch, self._table_epochs)
        ends = self._table(table_idx)[:, stream]
        first = int(ends[row - 1]) if row else int(self._table_starts[table_idx][stream])
        return first, int(ends[row]) - first


@dataclass(frozen=True)
class CorpusRecord:
    """The corpus at a run's start: usable samples of each shard by name, in order, and bad samples by reason."""

    shards: dict[str, int]
    bad: Counter[str]


def read_corpus_record(path: Path, train: Sequence[str], caption: str | None) -> tuple[CorpusRecord, int] | None:
    """Read a run's corpus record and its checksum; None where it is missing, damaged, or of another corpus."""
    try:
        text = path.read_bytes()
        stored = json.loads(text)
        if stored["of"] != _corpus_key(train, caption):
            return None
        shards = {str(name): int(size) for name, size in stored["shards"].items()}
        bad = Counter({str(reason): int(n) for reason, n in stored["bad"].items()})
        return CorpusRecord(shards, bad), zlib.crc32(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def recorded_shard_names(path: Path, train: Sequence[str]) -> list[str] | None:
    """Return the names of the shards that a run recorded for these patterns; None where it recorded none."""
    try:
        stored = json.loads(path.read_bytes())
        return list(stored["shards"]) if stored["of"]["train"] == list(train) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_corpus_record(path: Path, train: Sequence[str], caption: str | None, record: CorpusRecord) -> None:
    """Write the record atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"of": _corpus_key(train, caption), "shards": record.shards, "bad": record.bad}
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _corpus_key(train: Sequence[str], caption: str | None) -> dict[str, Any]:
    return {"train": list(train), "caption": caption}


def sum_key_hashes(keys: Iterable[str]) -> int:
    """Add up the hashes of sample keys, modulo 2^64."""
    return sum(map(hash_text, keys)) % 2**64


def sum_hashes(words: Words) -> int:
    """Add up hashes, modulo 2^64."""
    return int(words.sum(dtype=np.uint64))


def chain_digest(digest: str, sums: Iterable[int]) -> str:
    """Return the digest after further steps, each given by its sum over all ranks; a run begins with ""."""
    state = np.array([int(digest or "0", 16)], np.uint64)
    for step_sum in sums:
        state = hash_words(state, np.array([step_sum % 2**64], np.uint64))
        digest = f"{int(state[0]):016x}"
    return digest


class CorpusFacts:
    """Facts of a corpus and its order that a resume compares with the checkpoint's; reads no shard.

    Has a copy of the order, because an Order caches what it located and is not thread-safe.
    """

    def __init__(self, names: Sequence[str], order: Order) -> None:
        self._order = Order(order.sizes, order.streams, order.block_shards, order.seed)
        listing = [f"{PurePath(name).name} {size}" for name, size in zip(names, order.sizes, strict=True)]
        self._fixed = {
            "shards": str(len(names)),
            "samples": str(int(order.sizes.sum())),
            "names and sizes of the shards": f"{hash_text(chr(10).join(listing)):016x}",
        }

    def at(self, position: int) -> dict[str, str]:
        """Return the facts as texts by name: numbers and digest of shards, and the order from `position` on."""
        next_samples = hash_words(*self._order.locate_many(position + np.arange(NUM_COMPARED_SAMPLES)))
        return self._fixed | {"order of the next samples": chain_digest("", map(int, next_samples))}
