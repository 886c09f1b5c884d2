"""Which samples a run was trained on, in sixteen digits; and which it will be, by the order it goes by.

A step's sum of hashes does not care who served which sample, so ranks add theirs and any world size comes to the same;
steps are chained, so their order counts. Equal digests: the same samples in the same steps.

    own = sum_of_keys(["00000/000001", "00003/000017"])            # of one rank's rows
    chained("", [own + others, ...])                               # "5f3c..." after so many steps

`CorpusFacts` are what a checkpoint holds the corpus of a resumed run against. It reads no shard: names, sizes, and the
places at which the order function puts the next samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath

import numpy as np

from data.hashing import Words, hash_text, hash_words
from data.order import Order

LOOKED_AT = 256  # samples after the cursor whose places are compared


def sum_of_keys(keys: Iterable[str]) -> int:
    """Of sample keys, modulo 2^64."""
    return sum(map(hash_text, keys)) % 2**64


def sum_of_words(words: Words) -> int:
    """Of hashes that are there already, modulo 2^64."""
    return int(words.sum(dtype=np.uint64))


def chained(digest: str, sums: Iterable[int]) -> str:
    """The digest after further steps, each given by its sum over all ranks; "" is that of a run's beginning."""
    state = np.array([int(digest or "0", 16)], np.uint64)
    for step_sum in sums:
        state = hash_words(state, np.array([step_sum % 2**64], np.uint64))
        digest = f"{int(state[0]):016x}"
    return digest


class CorpusFacts:
    """Of the corpus whose shards have these names and go by this order; with an order of its own, which remembers what
    it has looked up and which no other thread is in."""

    def __init__(self, names: Sequence[str], order: Order) -> None:
        self._order = Order(order.sizes, order.streams, order.block_shards, order.seed)
        listing = [f"{PurePath(name).name} {size}" for name, size in zip(names, order.sizes, strict=True)]
        self._fixed = {
            "shards": str(len(names)),
            "samples": str(int(order.sizes.sum())),
            "names and sizes of the shards": f"{hash_text(chr(10).join(listing)):016x}",
        }

    def at(self, position: int) -> dict[str, str]:
        """By name, as text: how many shards and samples, which, and where the samples from `position` on stand."""
        places = hash_words(*self._order.locate_many(position + np.arange(LOOKED_AT)))
        return self._fixed | {"order of the next samples": chained("", map(int, places))}
