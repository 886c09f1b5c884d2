"""The loader bench's baseline: what one would write with PyTorch, webdataset's layout and Pillow, and nothing else.

A `torch.utils.data.DataLoader` with worker processes over an iterable dataset that walks tars with `tarfile`, decodes
with Pillow and makes each view by a chain with torchvision's semantics (random resized crop with bilinear antialias,
flip, colour jitter in random order, grey, Gaussian blur, solarise), written in Pillow's own operators, which are the
faster ones: torchvision's blur of a Pillow image goes through a convolution.

    for images, global_crops, local_crops, captions in pil_loader(shards, views, encode, batch_size=16, workers=1): ...

Nothing of the product imports this.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from configs.data import Views
from configs.section import AreaRange

Sample = tuple[list[Tensor], str]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Encode = Callable[[list[str]], Tensor]
IMAGES, TEXT = (".jpg", ".png", ".webp"), ".txt"


def pil_loader(shards: Sequence[str], views: Views, encode: Encode, batch_size: int, workers: int) -> Iterable[Batch]:
    """One epoch of whole batches, uint8 as ours: images, global crops, local crops (both view-major), captions."""
    loader: DataLoader[Any] = DataLoader(  # of Sample in, Batch out
        TarViews(tuple(shards), views),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collate(encode),
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a forked child would inherit our loader's threads half alive
    )
    return loader


@dataclass(frozen=True)
class TarViews(IterableDataset[Sample]):
    """Each sample's views, clip's first, and its caption; a worker reads every n-th sample of every shard."""

    shards: tuple[str, ...]
    views: Views

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        draw = random.Random(first)
        for number, (data, caption) in enumerate(_samples(self.shards)):
            if number % step == first:
                with Image.open(io.BytesIO(data)) as picture:
                    yield _all_views(picture.convert("RGB"), self.views, draw), caption


@dataclass(frozen=True)
class _Collate:
    encode: Encode

    def __call__(self, samples: list[Sample]) -> Batch:
        rows, captions = zip(*samples, strict=True)
        images = torch.stack([row[0] for row in rows])
        global_crops = torch.stack([row[view] for view in (1, 2) for row in rows])
        local_crops = torch.stack([row[view] for view in range(3, len(rows[0])) for row in rows])
        return images, global_crops, local_crops, self.encode(list(captions))


def _samples(shards: Sequence[str]) -> Iterator[tuple[bytes, str]]:
    """(encoded picture, caption) of neighbouring members with one key, as webdataset groups them."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for _, members in itertools.groupby(tar, key=lambda member: member.name.partition(".")[0]):
                files = {Path(member.name).suffix: tar.extractfile(member) for member in members}
                data = {suffix: file.read() for suffix, file in files.items() if file and suffix in (*IMAGES, TEXT)}
                yield next(data[suffix] for suffix in IMAGES if suffix in data), data[TEXT].decode()


def _all_views(picture: Image.Image, views: Views, draw: random.Random) -> list[Tensor]:
    first = _tensor(_crop(picture, views.image_size, views.image_scale, draw))
    global_views = [
        _ssl_view(picture, views.global_size, views.global_scale, views.blur[i], i * views.solarise, views, draw)
        for i in range(2)
    ]
    local_views = [
        _ssl_view(picture, views.local_size, views.local_scale, views.blur[2], 0.0, views, draw)
        for _ in range(views.num_locals)
    ]
    return [first, *global_views, *local_views]


def _ssl_view(
    picture: Image.Image,
    size: int,
    scale: AreaRange,
    blur: float,
    solarise: float,
    views: Views,
    draw: random.Random,
) -> Tensor:
    crop = _crop(picture, size, scale, draw)
    if draw.random() < views.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < views.jitter:
        crop = _jitter(crop, views, draw)
    if draw.random() < views.grey:
        crop = crop.convert("L").convert("RGB")
    if draw.random() < blur:
        crop = crop.filter(ImageFilter.GaussianBlur(draw.uniform(*views.blur_sigma)))
    if draw.random() < solarise:
        crop = ImageOps.solarize(crop, 128)
    return _tensor(crop)


def _crop(picture: Image.Image, size: int, scale: AreaRange, draw: random.Random) -> Image.Image:
    window = _window(picture.width, picture.height, scale, draw)
    return picture.crop(window).resize((size, size), Image.Resampling.BILINEAR)


def _window(width: int, height: int, scale: AreaRange, draw: random.Random) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - tall)
            return left, top, left + wide, top + tall
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _jitter(crop: Image.Image, views: Views, draw: random.Random) -> Image.Image:
    def factor(strength: float) -> float:
        return draw.uniform(max(0.0, 1 - strength), 1 + strength)

    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(factor(views.brightness)),
        lambda image: ImageEnhance.Contrast(image).enhance(factor(views.contrast)),
        lambda image: ImageEnhance.Color(image).enhance(factor(views.saturation)),
        lambda image: _turn_hue(image, draw.uniform(-views.hue, views.hue)),
    ]
    draw.shuffle(changes)
    for change in changes:
        crop = change(crop)
    return crop


def _turn_hue(crop: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = crop.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turns * 255) % 256)  # 256 values are a full turn
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _tensor(crop: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
