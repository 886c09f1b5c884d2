"""Bench of the data loader against a plain PyTorch loader with Pillow, core for core.

Both make, from the same shards, every view of the ssl pipeline for every image: the clip view, two global and the local
crops, with flip, jitter, grey, blur and solarisation at the same odds, and the token ids of the caption. Everything is
pinned to one core (a rank of one loader thread against one worker process), then to two: two workers against one rank
of two threads, and against two ranks of one thread, each a process with Python's lock for itself, as in a run; where
there is a GPU, one rank also has DALI decode and render there. A round is a number of images, from the first byte read
to the last batch in hand, with nothing made ahead.

Two pipelines: the demo's on its own synthetic corpus (64 px; jpg, png and webp), and 256 px on photographs: four of
scikit-image's, resized to short sides of 256 to 500 px, as JPEGs of quality 90.

The baseline, `pil_loader`, is what one would write with PyTorch and Pillow alone: a `torch.utils.data.DataLoader` with
worker processes over an iterable dataset that reads tars with `tarfile`, decodes with Pillow and makes each view with
torchvision's semantics (random resized crop with bilinear antialias, flip, colour jitter in random order, grey,
Gaussian blur, solarise) in Pillow's own operators, which are the faster ones: torchvision's blur goes through a
convolution.
"""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from configs import Config, load_config
from configs.data import Views
from configs.section import AreaRange
from data.captions import CaptionEncoder
from data.corpora.samples import CorpusSample
from data.corpora.synthetic_images import synthetic_plan
from data.corpus import build, write_shards
from data.loader import BatchLoader
from profiling.benches.recorder import BenchRecorder, BenchResult
from profiling.instruments.machine import device

PilSample = tuple[list[Tensor], str]
PilBatch = tuple[Tensor, Tensor, Tensor, Tensor]
Encode = Callable[[list[str]], Tensor]
IMAGES, TEXT = (".jpg", ".png", ".webp"), ".txt"


def pil_loader(
    shards: Sequence[str], views: Views, encode: Encode, batch_size: int, workers: int
) -> Iterable[PilBatch]:
    """One epoch of whole batches, uint8 as ours: images, global crops, local crops (both view-major), captions."""
    loader: DataLoader[Any] = DataLoader(  # of PilSample in, PilBatch out
        PilDataset(tuple(shards), views),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_PilCollate(encode),
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a forked child would inherit our loader's threads half alive
    )
    return loader


@dataclass(frozen=True)
class PilDataset(IterableDataset[PilSample]):
    """Each sample's views, clip's first, and its caption; a worker reads every n-th sample of every shard."""

    shards: tuple[str, ...]
    views: Views

    def __iter__(self) -> Iterator[PilSample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        draw = random.Random(first)
        for number, (data, caption) in enumerate(_samples(self.shards)):
            if number % step == first:
                with Image.open(io.BytesIO(data)) as picture:
                    yield _all_views(picture.convert("RGB"), self.views, draw), caption


@dataclass(frozen=True)
class _PilCollate:
    encode: Encode

    def __call__(self, samples: list[PilSample]) -> PilBatch:
        rows, captions = zip(*samples, strict=True)
        images = torch.stack([row[0] for row in rows])
        global_crops = torch.stack([row[view] for view in (1, 2) for row in rows])
        local_crops = torch.stack([row[view] for view in range(3, len(rows[0])) for row in rows])
        return images, global_crops, local_crops, self.encode(list(captions))


def _samples(shards: Sequence[str]) -> Iterator[tuple[bytes, str]]:
    """(encoded image, caption) of neighbouring members with one key, as webdataset groups them."""
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


TensorKind = tuple[torch.dtype, tuple[int, ...]]


class LoaderRanks:
    """Loader processes, one for each rank; batches stay in their process."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def make(self, steps: int) -> list[list[TensorKind]]:
        """Load so many further steps; return dtype and shape of the tensors of every batch, in rank order."""
        for pipe in self._pipes:
            pipe.send(steps)
        return [kinds for pipe in self._pipes for kinds in pipe.recv()]


@contextmanager
def loader_ranks(config: Config, world_size: int) -> Iterator[LoaderRanks]:
    """Start a process for each rank, with one torch thread, and end them."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of the parent's threads
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(there, config, rank, world_size), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        yield LoaderRanks(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _serve(pipe: Connection, config: Config, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    with closing(BatchLoader(config, encoder, rank=rank, world_size=world_size)) as loader:
        steps = count()
        try:
            while True:
                batches = [loader.batch(next(steps)) for _ in range(pipe.recv())]
                tensors = [(b.images, b.global_crops, b.local_crops, b.captions) for b in batches]
                pipe.send([[(t.dtype, tuple(t.shape)) for t in batch] for batch in tensors])
        except EOFError:  # the other end is closed
            return


PRESETS = Path(__file__).resolve().parents[2] / "configs"
SHORT_SIDES = (256, 500)  # pixels of the photographs, as in web corpora


@dataclass(frozen=True)
class ViewPipeline:
    """The views of a preset that both loaders make, `images` a round in batches of `batch`."""

    name: str
    preset: str
    shards: str  # of the two kinds made for this bench
    batch: int
    images: int

    def config(self, corpus: Path, threads: int, ranks: int = 1, where: str = "cpu") -> Config:
        """The preset's views, every image in the ssl pipeline, on this corpus and so many threads a rank."""
        overrides = [
            f"data.train=[{corpus}/{self.shards}-*.tar]",
            f"data.tokenizer={corpus}/tokenizer.json",
            f"data.streams={ranks}",
            f"batch={{clip: {ranks * self.batch}, ssl: {ranks * self.batch}, rec: 0}}",
            "objectives.rec={weight: 0, perceptual: 0}",
            f"system.loader={{threads: {threads}, device: {where}}}",
        ]
        return load_config(PRESETS / self.preset, overrides)


PIPELINES = (
    ViewPipeline("demo chain, synthetic scenes", "demo.yaml", "train", batch=64, images=256),
    ViewPipeline("256 px chain, photographs", "vtp_s.yaml", "photographs", batch=16, images=64),
)
CORES = (1, 2)


def bench_loader(recorder: BenchRecorder) -> None:
    """Both loaders, for each pipeline and number of cores."""
    cores = [number for number in CORES if number <= len(os.sched_getaffinity(0))]
    pipelines = (
        tuple(replace(pipeline, images=2 * pipeline.batch) for pipeline in PIPELINES) if recorder.is_dry else PIPELINES
    )
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        scenes, photos = (pipeline.images for pipeline in pipelines)
        build(corpus, synthetic_plan(scenes, held_out=0, size=64, shard_size=scenes // 2, seed=0, workers=1))
        write_shards(photographs(photos), corpus, "photographs", shard_size=photos // 2)
        for pipeline in pipelines:
            for number in cores:
                _measure(pipeline, corpus, number, recorder)


def photographs(number: int) -> Iterator[CorpusSample]:
    """JPEGs of four photographs in many sizes."""
    try:
        from skimage import data
    except ImportError:
        raise ImportError("the loader bench takes its photographs from scikit-image: pip install .[test]") from None
    motifs = [Image.fromarray(motif()) for motif in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    draw = random.Random(0)
    for index in range(number):
        motif = motifs[index % len(motifs)]
        scale = draw.uniform(*SHORT_SIDES) / min(motif.size)
        resized = motif.resize((round(scale * motif.width), round(scale * motif.height)), Image.Resampling.BICUBIC)
        with io.BytesIO() as file:
            resized.save(file, "JPEG", quality=90)
            yield CorpusSample(file.getvalue(), "jpg", "a photograph that ships with scikit-image", {})


def _measure(pipeline: ViewPipeline, corpus: Path, cores: int, recorder: BenchRecorder) -> None:
    config = pipeline.config(corpus, threads=cores)
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    ranked = loader_ranks(pipeline.config(corpus, threads=1, ranks=cores), cores)
    with _pinned(cores), closing(BatchLoader(config, encoder)) as loader, ranked as ranks, ExitStack() as stack:
        plain = pil_loader(loader.reader.shards.names, config.views, encoder.encode, pipeline.batch, workers=cores)
        steps = count()

        def made_by(loader: BatchLoader) -> list[tuple[Tensor, ...]]:
            batches = [loader.batch(next(steps)) for _ in range(pipeline.images // pipeline.batch)]
            return [(b.images, b.global_crops, b.local_crops, b.captions) for b in batches]

        def ours() -> list[tuple[Tensor, ...]]:
            return made_by(loader)

        def pil() -> list[tuple[Tensor, ...]]:
            return list(plain)

        def each_rank() -> list[list[TensorKind]]:
            return ranks.make(pipeline.images // pipeline.batch // cores)

        made = {make.__name__: [[_tensor_kind(t) for t in batch] for batch in make()] for make in (ours, pil)}
        assert made["ours"] == made["pil"] == each_rank(), f"not the same tensors: {made}"
        variants: dict[str, Callable[[], object]] = {"pil": pil, f"ours, 1 rank of {cores} thread(s)": ours}
        if cores > 1:
            variants[f"ours, {cores} ranks of 1 thread"] = each_rank
        if device().type == "cuda":
            on_gpu = stack.enter_context(closing(BatchLoader(pipeline.config(corpus, cores, where="gpu"), encoder)))
            variants[f"ours, 1 rank of {cores} thread(s), pixels on the GPU"] = lambda: made_by(on_gpu)
        result = recorder.measure("loader", _workload(pipeline, config, cores), variants, "pil", with_memory=False)
    recorder.add(replace(result, notes=_rates(result, pipeline, config, cores)))


@contextmanager
def _pinned(cores: int) -> Iterator[None]:
    """Pin the calling thread, and what it starts inside, to the first `cores` cores it may use; one torch thread."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def _tensor_kind(tensor: Tensor) -> TensorKind:
    return tensor.dtype, tuple(tensor.shape)


def _workload(pipeline: ViewPipeline, config: Config, cores: int) -> str:
    v = config.views
    sizes = f"clip {v.image_size}, 2 x {v.global_size}, {v.num_locals} x {v.local_size} px"
    return f"{pipeline.name}: {sizes}; {pipeline.images} images a round, batches of {pipeline.batch}, {cores} core(s)"


def _rates(result: BenchResult, pipeline: ViewPipeline, config: Config, cores: int) -> tuple[str, ...]:
    num_views = 3 + config.views.num_locals
    speeds = {row.variant: pipeline.images / row.median_ms * 1000 for row in result.rows}
    return tuple(
        f"{variant}: {speed:.1f} images/s, {speed * num_views / cores:.0f} views/s a core"
        for variant, speed in speeds.items()
    )
