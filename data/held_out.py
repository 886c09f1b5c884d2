"""Held-out images with labels, for evaluation: every sample once, in index order, in the field's centre crop.

    images = HeldOutImages(["corpus/held_out-*.tar"], 256, config.system, max_pixels=50_000_000)
    for batch in images.batches(128):
        batch.images, batch.labels            # (128, 3, 256, 256) uint8, (128,) int64

    adm_crop(pixels_HWC, 256)                 # (375, 500, 3) uint8 -> (3, 256, 256) uint8

A label is the number in field `label` of a sample's .json member, or in its .cls member, as webdataset writes it; or
the name of a class there, which is looked up in a class table (data/annotations.py). Captions are not read.

Ranks share the work: rank r of W reads the samples r, r + W, ... of the same list, and `positions` numbers the rows
among those of all ranks.

The crop is the one that published FIDs are computed on (guided-diffusion's `center_crop_arr`, adopted by DiT, SiT and
LightningDiT):

1. while the short side is at least twice the size, both sides are halved by a box filter
2. the short side is resized to the size by a bicubic filter (a = -1/2), widened where it shrinks
3. the centre is cut out

A resize goes along rows, then along columns, rounded to whole numbers in between: Pillow's numbers, to one level of
255, of all its versions before 13, which begins with the cheaper axis. Along an axis it is a product with a matrix of
filter weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from configs.data import WHITE, Colour
from configs.run import System
from data.annotations import ClassIndex
from data.decode import DecodedImage, Decoder
from data.sample_reader import read_sample
from data.shards import BadMember, EncodedSample, Shards
from data.storage import Unreadable, expand_patterns

MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class LabelledBatch:
    """Samples of one rank that could be decoded, in index order."""

    images: torch.Tensor  # (n, 3, size, size) uint8, centre crop
    labels: torch.Tensor  # (n,) int64, -1 without one
    positions: torch.Tensor  # (n,) int64: rows of all ranks' batches, numbered in index order
    keys: tuple[str, ...]  # "shard/sample"


def check_number_of_classes(labels: torch.Tensor) -> None:
    """Raise UserError for a label that is a hash or an id: models that learn from labels have a row for each class."""
    if len(labels) and (highest := int(labels.max())) >= MAX_CLASSES:
        raise UserError(
            f"a sample has label {highest}: labels number the classes, from 0 on and below {MAX_CLASSES:,}; write the "
            "shards with such numbers"
        )


@dataclass(frozen=True)
class _LabelledImage:
    position: int
    label: int
    sample: EncodedSample
    image: DecodedImage


class HeldOutImages:
    """The samples of the shards that `patterns` name, undecodable ones skipped and counted in `bad`.

    `background` is the colour behind transparent images. `limit` keeps that many samples, evenly spaced over the
    index, so that shards sorted by class stay balanced. `key` names the patterns in errors. `classes` is the table
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
        self.shards = Shards(expand_patterns(patterns, cache_dir, key), None, cache_dir, tries=system.loader.tries)
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
        self._sample_positions = (np.arange(self.num_samples, dtype=np.int64) * total // self.num_samples)[
            rank::world_size
        ]
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Number of samples this rank reads; some may turn out bad."""
        return len(self._sample_positions)

    def batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Iterate over the good samples of this rank, `batch_size` at a time; the last batch can be smaller."""
        self.bad = Counter(self.shards.bad) if self._rank == 0 else Counter()
        waiting: list[_LabelledImage] = []
        for start in range(0, len(self._sample_positions), batch_size):
            waiting += self._decode_good(range(start, min(start + batch_size, len(self._sample_positions))))
            if len(waiting) >= batch_size:
                yield self._batch(waiting[:batch_size])
                waiting = waiting[batch_size:]
        if waiting:
            yield self._batch(waiting)

    def close(self) -> None:
        """End the decoder's threads."""
        self._decoder.close()

    def _decode_good(self, own: range) -> Iterator[_LabelledImage]:
        read = [self._read(int(self._sample_positions[i])) for i in own]
        decoded = iter(self._decoder.decode([item[0].image for item in read if not isinstance(item, str)]))
        for i, item in zip(own, read, strict=True):
            found = item if isinstance(item, str) else next(decoded)
            if isinstance(item, str) or isinstance(found, str):
                self.bad[str(found)] += 1
            else:
                yield _LabelledImage(self._rank + i * self._world_size, item[1], item[0], found)

    def _read(self, position: int) -> tuple[EncodedSample, int] | str:
        """Read the sample at a position of the index, and its label; return the reason instead where it is bad."""
        shard_idx = int(np.searchsorted(self._starts, position, side="right")) - 1
        sample_idx = position - int(self._starts[shard_idx])
        try:
            sample = read_sample(self.shards, shard_idx, sample_idx, self.max_pixels)
            if isinstance(sample, str):
                return sample
            return sample, self.shards.label(shard_idx, sample_idx, self.classes)
        except (BadMember, Unreadable) as error:
            return str(error)

    def _batch(self, rows: Sequence[_LabelledImage]) -> LabelledBatch:
        return LabelledBatch(
            images=torch.stack([adm_crop(self._decoder.to_tensor(row.image), self.size) for row in rows]),
            labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
            positions=torch.tensor([row.position for row in rows], dtype=torch.int64),
            keys=tuple(row.sample.key for row in rows),
        )


def adm_crop(pixels_HWC: Tensor, size: int) -> Tensor:
    """Crop and resize (height, width, 3) uint8 of any sides to (3, size, size) uint8, on the same device."""
    pixels_CHW = pixels_HWC.permute(2, 0, 1)
    while min(pixels_CHW.shape[1:]) >= 2 * size:
        height, width = pixels_CHW.shape[1:]
        pixels_CHW = _resize(pixels_CHW, height // 2, width // 2, "box")
    height, width = pixels_CHW.shape[1:]
    scale = size / min(height, width)
    pixels_CHW = _resize(pixels_CHW, round(height * scale), round(width * scale), "bicubic")
    top, left = ((side - size) // 2 for side in pixels_CHW.shape[1:])
    return pixels_CHW[:, top : top + size, left : left + size]


def _resize(pixels_CHW: Tensor, height: int, width: int, kind: str) -> Tensor:
    """Resize rows, then columns; an axis that keeps its length is left as it is."""
    if width != pixels_CHW.shape[2]:
        pixels_CHW = _round_to_uint8(
            pixels_CHW.float() @ _resize_weights(pixels_CHW.shape[2], width, kind).to(pixels_CHW.device).T
        )
    if height != pixels_CHW.shape[1]:
        pixels_CHW = _round_to_uint8(
            _resize_weights(pixels_CHW.shape[1], height, kind).to(pixels_CHW.device) @ pixels_CHW.float()
        )
    return pixels_CHW


def _round_to_uint8(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255).to(torch.uint8)


@lru_cache(64)  # of a corpus's commonest sides
def _resize_weights(length: int, target: int, kind: str) -> Tensor:
    """Return (target, length) weights of the pixels of a line in each pixel of the resized one; rows sum to 1."""
    kernel, reach = _KERNELS[kind]
    scale = length / target
    widening = max(scale, 1.0)
    centre_T1 = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    first_T1 = (centre_T1 - reach * widening + 0.5).floor()  # pixels beyond the filter's reach have no weight
    last_T1 = (centre_T1 + reach * widening + 0.5).floor()
    pixel_L = torch.arange(length, dtype=torch.float64)
    weight_TL = kernel((pixel_L - centre_T1 + 0.5) * (1 / widening))
    weight_TL = torch.where((pixel_L >= first_T1) & (pixel_L < last_T1), weight_TL, 0.0)
    return (weight_TL / weight_TL.sum(dim=1, keepdim=True)).float()


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"box": (_box, 0.5), "bicubic": (_bicubic, 2.0)}
