"""Labelled pictures for evaluation: every sample once, in index order, centre-cropped.

    pictures = HeldOut(["corpus/held_out-*.tar"], 256, config.system, max_pixels=50_000_000)
    for batch in pictures.batches(128):
        batch.images, batch.labels            # (128, 3, 256, 256) uint8, (128,) int64

A label is the number in field `label` of a sample's .json member, or in its .cls member, as webdataset writes it; or
the name of a class there, which is looked up in a class table (data/labels.py). Captions are not read. The picture is
its centred square, cut and resized as the field's published figures have it (data/adm_crop.py).

Ranks share the work: rank r of W reads the samples r, r + W, ... of the same list, so `positions` says where a row
belongs among all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs import UserError
from configs.data import WHITE, Colour
from configs.system import System
from data.adm_crop import adm_crop
from data.decode import Decoder, Picture
from data.labels import ClassIndex
from data.patience import Unreadable
from data.reading import read_sample
from data.shards import BadMember, Sample, Shards
from data.storage import expand

MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class LabelledBatch:
    """Samples of one rank that could be decoded, in index order."""

    images: torch.Tensor  # (n, 3, size, size) uint8, centre crop
    labels: torch.Tensor  # (n,) int64, -1 without one
    positions: torch.Tensor  # (n,) int64: rows of all ranks' batches, numbered in index order
    keys: tuple[str, ...]  # "shard/sample"


def check_number_of_classes(labels: torch.Tensor) -> None:
    """Raises UserError for a label that is a hash or an id: whoever learns from labels has a row for each class."""
    if len(labels) and (highest := int(labels.max())) >= MOST_CLASSES:
        raise UserError(
            f"a sample has label {highest}: labels number the classes, from 0 on and below {MOST_CLASSES:,}; write the "
            "shards with such numbers"
        )


@dataclass(frozen=True)
class _Row:
    position: int
    label: int
    sample: Sample
    picture: Picture


class HeldOut:
    """The samples of the shards that `patterns` name, undecodable ones skipped and counted in `bad`.

    `background` is the colour behind transparent pictures. `limit` keeps that many samples, evenly spaced over the
    index, so that shards sorted by class stay balanced. `key` is what errors call the patterns. `classes` is the table
    of class names; else it is the classes.json beside the first shard. Raises UserError for missing shards or none.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        size: int,
        system: System,
        max_pixels: int,
        *,
        background: Colour = WHITE,
        key: str = "data.held_out",
        limit: int | None = None,
        classes: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.max_pixels = size, max_pixels
        cache_dir = system.loader.cache_dir
        self.shards = Shards(expand(patterns, cache_dir, key), None, cache_dir, tries=system.loader.tries)
        self.bad: Counter[str] = Counter()
        self.classes = ClassIndex(classes or Path(self.shards.names[0]).parent / "classes.json")
        self._decoder = Decoder(system.loader.device, system.loader.threads, background)
        self._starts = np.concatenate([[0], np.cumsum(self.shards.sizes)])
        total = int(self._starts[-1])
        if not total:
            raise UserError(
                f"{key}={list(patterns)} holds no readable sample ({dict(self.shards.bad)}): mend the shards"
            )
        self.num_samples = min(limit or total, total)
        self._places = (np.arange(self.num_samples, dtype=np.int64) * total // self.num_samples)[rank::world_size]
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Samples this rank looks at; decoding may find some of them bad."""
        return len(self._places)

    def batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """All good samples of this rank, `batch_size` at a time; the last batch can be smaller."""
        self.bad = Counter(self.shards.bad) if self._rank == 0 else Counter()
        waiting: list[_Row] = []
        for start in range(0, len(self._places), batch_size):
            waiting += self._good(range(start, min(start + batch_size, len(self._places))))
            if len(waiting) >= batch_size:
                yield self._batch(waiting[:batch_size])
                waiting = waiting[batch_size:]
        if waiting:
            yield self._batch(waiting)

    def close(self) -> None:
        """Ends the decoder's threads."""
        self._decoder.close()

    def _good(self, own: range) -> Iterator[_Row]:
        read = [self._read(int(self._places[i])) for i in own]
        decoded = iter(self._decoder.decode([item[0].image for item in read if not isinstance(item, str)]))
        for i, item in zip(own, read, strict=True):
            found = item if isinstance(item, str) else next(decoded)
            if isinstance(item, str) or isinstance(found, str):
                self.bad[str(found)] += 1
            else:
                yield _Row(self._rank + i * self._world_size, item[1], item[0], found)

    def _read(self, place: int) -> tuple[Sample, int] | str:
        """The sample and its label, or the reason why it is bad."""
        shard_idx = int(np.searchsorted(self._starts, place, side="right")) - 1
        sample_idx = place - int(self._starts[shard_idx])
        try:
            sample = read_sample(self.shards, shard_idx, sample_idx, self.max_pixels)
            if isinstance(sample, str):
                return sample
            return sample, self.shards.label(shard_idx, sample_idx, self.classes)
        except (BadMember, Unreadable) as error:
            return str(error)

    def _batch(self, rows: Sequence[_Row]) -> LabelledBatch:
        return LabelledBatch(
            images=torch.stack([adm_crop(self._decoder.tensor(row.picture), self.size) for row in rows]),
            labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
            positions=torch.tensor([row.position for row in rows], dtype=torch.int64),
            keys=tuple(row.sample.key for row in rows),
        )
