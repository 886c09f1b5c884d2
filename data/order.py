"""Which sample stands at which position: a pure function of (shard sizes, seed, global sample number).

Position g belongs to stream g mod C and is number g // C there. A stream is infinite: its epoch e runs
through the shards dealt to it in epoch e, block by block, the samples of a block permuted. Each epoch deals
every shard to one stream, so over all streams an epoch holds every sample exactly once, however uneven the
shards are.

Why: the whole state of the data is one integer. Resume is a jump, another world size is a division, and rank
r of W (W divides C) serves the positions g = r mod W, so each shard is read by one rank at a time.

    order = Order([100, 100, 80], streams=2, block_shards=2, seed=0)
    order.locate(10**9)            # Place(epoch=..., shard_idx=..., sample_idx=...), without walking there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs import UserError
from data.hashing import hash_words, permutation

Ints = NDArray[np.int64]
_DEAL, _BLOCK, _FILL = 1, 2, 3  # what a hash is for
_BLOCK_FILLS = 16  # fills tried in the position's own block (its shards are open) before the whole stream epoch
_TABLE_ENTRIES = 1 << 16  # so many (epoch, shard) pairs are dealt at once when looking for a far epoch


@dataclass(frozen=True)
class Place:
    """A sample: shard and number within the shard, both from 0, in the epoch in which its stream meets it."""

    epoch: int
    shard_idx: int
    sample_idx: int


@dataclass(frozen=True)
class _Block:
    """Consecutive shards of one stream epoch with their samples in the order they are served."""

    stream: int
    epoch: int
    first: int  # number, within the stream, of the block's first sample
    shard_idx: Ints
    sample_idx: Ints

    def __len__(self) -> int:
        return len(self.shard_idx)

    def holds(self, number: int) -> bool:
        return self.first <= number < self.first + len(self)

    def place(self, inside: int) -> Place:
        return Place(self.epoch, int(self.shard_idx[inside]), int(self.sample_idx[inside]))


class Order:
    """The infinite sample sequence of a corpus.

    `shard_sizes` counts the usable samples of each shard; a shard with none is never dealt. Raises UserError
    when fewer than `streams` shards hold samples.
    """

    def __init__(self, shard_sizes: Sequence[int] | Ints, streams: int, block_shards: int, seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.streams, self.block_shards, self.seed = streams, block_shards, seed
        self._filled = np.flatnonzero(self.sizes)
        if len(self._filled) < streams:
            raise UserError(
                f"data.train: {len(self._filled)} of {len(self.sizes)} shards hold usable samples but "
                f"data.streams={streams}: every stream reads shards of its own; lower data.streams or write "
                "the corpus in more shards"
            )
        self._current: dict[int, _Block] = {}  # by stream: positions mostly come in sequence
        self._table_epochs = max(1, _TABLE_ENTRIES // len(self._filled))
        self._table_starts = [np.zeros(streams, np.int64)]  # number at which each stream enters each epoch table
        self._table = lru_cache(4)(self._make_table)
        self._deal = lru_cache(8)(self._make_deal)
        self._block = lru_cache(2 * streams + 4)(self._make_block)

    def locate(self, position: int) -> Place:
        """The sample at a global position (0, 1, 2, ... without end)."""
        stream, number = position % self.streams, position // self.streams
        block = self._find(stream, number)
        return block.place(number - block.first)

    def locate_many(self, positions: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """(epoch, shard_idx, sample_idx) of each position, each int64 of the positions' length."""
        places = [self.locate(int(position)) for position in np.asarray(positions)]
        table = np.array([(p.epoch, p.shard_idx, p.sample_idx) for p in places], np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def substitute(self, position: int, attempt: int) -> Place:
        """The filler for a bad sample: attempts draw from the same block, after 16 from the stream's epoch.

        A pure function of (seed, position, attempt). A draw may hit a bad sample again: then the next attempt
        is made.
        """
        assert attempt >= 1, "attempt 0 is the position's own sample"
        stream, number = position % self.streams, position // self.streams
        block = self._find(stream, number)
        draw = int(hash_words(self.seed, _FILL, position, attempt)[0])
        if attempt > _BLOCK_FILLS:
            first, length = self._epoch_span(stream, block.epoch)
            number = first + draw % length
            block = self._block_at(stream, block.epoch, first, number)
            return block.place(number - block.first)
        return block.place(draw % len(block))

    def _find(self, stream: int, number: int) -> _Block:
        block = self._current.get(stream)
        if block is None or not block.holds(number):
            epoch, first = self._epoch_of(stream, number)
            block = self._current[stream] = self._block_at(stream, epoch, first, number)
        return block

    def _block_at(self, stream: int, epoch: int, epoch_first: int, number: int) -> _Block:
        """The block holding `number` of the stream epoch that begins at `epoch_first`."""
        sizes = self.sizes[self._deal(epoch)[stream :: self.streams]]
        ends = epoch_first + np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.block_shards)))
        block_idx = int(np.searchsorted(ends, number, side="right"))
        return self._block(stream, epoch, block_idx, int(ends[block_idx - 1]) if block_idx else epoch_first)

    def _make_block(self, stream: int, epoch: int, block_idx: int, first: int) -> _Block:
        shards = self._deal(epoch)[stream :: self.streams][block_idx * self.block_shards :][: self.block_shards]
        shard_idx = np.repeat(shards, self.sizes[shards])
        sample_idx = np.concatenate([np.arange(size) for size in self.sizes[shards]])
        shuffled = permutation(len(shard_idx), self.seed, _BLOCK, epoch, stream, block_idx)
        return _Block(stream, epoch, first, shard_idx[shuffled], sample_idx[shuffled])

    def _make_deal(self, epoch: int) -> Ints:
        """All shards with samples as dealt in an epoch: entry j goes to stream j mod C."""
        return self._deal_many(np.array([epoch]))[0]

    def _deal_many(self, epochs: Ints) -> Ints:
        words = hash_words(self.seed, _DEAL, epochs[:, None], np.arange(len(self._filled))[None, :])
        return self._filled[np.argsort(words, axis=1, kind="stable")]

    def _make_table(self, table_idx: int) -> Ints:
        """The number at which each stream leaves each epoch of a table, (epochs, streams)."""
        epochs = table_idx * self._table_epochs + np.arange(self._table_epochs)
        sizes = self.sizes[self._deal_many(epochs)]
        lengths = np.stack([sizes[:, s :: self.streams].sum(1) for s in range(self.streams)], axis=1)
        return self._table_starts[table_idx] + np.cumsum(lengths, axis=0)

    def _epoch_of(self, stream: int, number: int) -> tuple[int, int]:
        """The stream's epoch that holds its sample `number`, and the number of that epoch's first sample."""
        while self._table_starts[-1][stream] <= number:
            self._table_starts.append(self._table(len(self._table_starts) - 1)[-1])
        starts = np.array([start[stream] for start in self._table_starts])
        table_idx = int(np.searchsorted(starts, number, side="right")) - 1
        row = int(np.searchsorted(self._table(table_idx)[:, stream], number, side="right"))
        epoch = table_idx * self._table_epochs + row
        return epoch, self._epoch_span(stream, epoch)[0]

    def _epoch_span(self, stream: int, epoch: int) -> tuple[int, int]:
        """(number of the first sample, number of samples) of a stream's epoch."""
        table_idx, row = divmod(epoch, self._table_epochs)
        ends = self._table(table_idx)[:, stream]
        first = int(ends[row - 1]) if row else int(self._table_starts[table_idx][stream])
        return first, int(ends[row]) - first
