"""The data loader against a plain PyTorch loader with Pillow (profiling/benches/pil_loader.py), core for core.

Both make, from the same shards, every view of the ssl chain for every image: the clip view, two global and the local
crops, with flip, jitter, grey, blur and solarisation at the same odds, and the token ids of the caption. Everything
runs pinned to one core (a rank of one loader thread against one worker process), then to two: two workers against one
rank of two threads, and against two ranks of one thread, each a process, as in a run; where there is a GPU, one rank
also has DALI decode and render there. A round is a number of images, from the first byte read to the last batch in
hand, with nothing made ahead.

Two chains: the demo's on its own synthetic corpus (64 px; jpg, png and webp), and 256 px on photographs: four of
scikit-image's, resized to short sides of 256 to 500 px, as JPEGs of quality 90.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from configs import Config, load_config
from data.captions import CaptionEncoder
from data.corpus import build, write_shards
from data.loader import Loader
from data.sample import Sample
from data.synthetic.plan import synthetic_plan
from profiling.benches.loader_ranks import Kind, loader_ranks
from profiling.benches.pil_loader import pil_loader
from profiling.machine import device
from profiling.measurement import Measurement, Recorder

PRESETS = Path(__file__).resolve().parents[2] / "configs"
SHORT_SIDES = (256, 500)  # pixels of the photographs, as in web corpora


@dataclass(frozen=True)
class Chain:
    """What both loaders make: the views of a preset, `images` a round in batches of `batch`."""

    name: str
    preset: str
    shards: str  # of the two kinds made for this bench
    batch: int
    images: int

    def config(self, corpus: Path, threads: int, ranks: int = 1, where: str = "cpu") -> Config:
        """The preset's views, every image in the ssl chain, on this corpus and so many threads a rank."""
        overrides = [
            f"data.train=[{corpus}/{self.shards}-*.tar]",
            f"data.tokenizer={corpus}/tokenizer.json",
            f"data.streams={ranks}",
            f"batch={{clip: {ranks * self.batch}, ssl: {ranks * self.batch}, rec: 0}}",
            "objectives.rec={weight: 0, perceptual: 0}",
            f"system.loader={{threads: {threads}, device: {where}}}",
        ]
        return load_config(PRESETS / self.preset, overrides)


CHAINS = (
    Chain("demo chain, synthetic scenes", "demo.yaml", "train", batch=64, images=256),
    Chain("256 px chain, photographs", "vtp_s.yaml", "photographs", batch=16, images=64),
)
CORES = (1, 2)


def run(recorder: Recorder) -> None:
    """A measurement for each chain and number of cores."""
    cores = [number for number in CORES if number <= len(os.sched_getaffinity(0))]
    chains = tuple(replace(chain, images=2 * chain.batch) for chain in CHAINS) if recorder.is_dry else CHAINS
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        scenes, photos = (chain.images for chain in chains)
        build(corpus, synthetic_plan(scenes, held_out=0, size=64, shard_size=scenes // 2, seed=0, workers=1))
        write_shards(photographs(photos), corpus, "photographs", shard_size=photos // 2)
        for chain in chains:
            for number in cores:
                _measure(chain, corpus, number, recorder)


def photographs(number: int) -> Iterator[Sample]:
    """JPEGs of real photographs in many sizes, without end of repetition: four motifs, each resized anew."""
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
            yield Sample(file.getvalue(), "jpg", "a photograph that ships with scikit-image", {})


def _measure(chain: Chain, corpus: Path, cores: int, recorder: Recorder) -> None:
    config = chain.config(corpus, threads=cores)
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    ranked = loader_ranks(chain.config(corpus, threads=1, ranks=cores), cores)
    with _pinned(cores), closing(Loader(config, encoder)) as loader, ranked as ranks, ExitStack() as stack:
        plain = pil_loader(loader.reader.shards.names, config.views, encoder.encode, chain.batch, workers=cores)
        steps = count()

        def made_by(loader: Loader) -> list[tuple[Tensor, ...]]:
            batches = [loader.batch(next(steps)) for _ in range(chain.images // chain.batch)]
            return [(b.images, b.global_crops, b.local_crops, b.captions) for b in batches]

        def ours() -> list[tuple[Tensor, ...]]:
            return made_by(loader)

        def pil() -> list[tuple[Tensor, ...]]:
            return list(plain)

        def each_rank() -> list[list[Kind]]:
            return ranks.make(chain.images // chain.batch // cores)

        made = {make.__name__: [[_kind(t) for t in batch] for batch in make()] for make in (ours, pil)}
        assert made["ours"] == made["pil"] == each_rank(), f"not the same tensors: {made}"
        variants: dict[str, Callable[[], object]] = {"pil": pil, f"ours, 1 rank of {cores} thread(s)": ours}
        if cores > 1:
            variants[f"ours, {cores} ranks of 1 thread"] = each_rank
        if device().type == "cuda":
            on_gpu = stack.enter_context(closing(Loader(chain.config(corpus, cores, where="gpu"), encoder)))
            variants[f"ours, 1 rank of {cores} thread(s), pixels on the GPU"] = lambda: made_by(on_gpu)
        found = recorder.measure("loader", _workload(chain, config, cores), variants, "pil", with_memory=False)
    recorder.add(replace(found, notes=_rates(found, chain, config, cores)))


@contextmanager
def _pinned(cores: int) -> Iterator[None]:
    """The calling thread, and what it starts meanwhile, on the first `cores` cores it may use; one torch thread."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def _kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tuple(tensor.shape)


def _workload(chain: Chain, config: Config, cores: int) -> str:
    v = config.views
    sizes = f"clip {v.image_size}, 2 x {v.global_size}, {v.num_locals} x {v.local_size} px"
    return f"{chain.name}: {sizes}; {chain.images} images a round, batches of {chain.batch}, {cores} core(s)"


def _rates(found: Measurement, chain: Chain, config: Config, cores: int) -> tuple[str, ...]:
    num_views = 3 + config.views.num_locals
    speeds = {row.variant: chain.images / row.median_ms * 1000 for row in found.rows}
    return tuple(
        f"{variant}: {speed:.1f} images/s, {speed * num_views / cores:.0f} views/s a core"
        for variant, speed in speeds.items()
    )
