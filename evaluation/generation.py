"""How near a generator's pictures come to a corpus's: FID for every guidance scale and every feature network.

    generation = Generation(pair, Options(guidance=(1.0, 4.0), fid=(Path("inception.pth"),)))
    generation.judge(4.0)               # [{"guidance": 4.0, "network": ..., "gfid": 2.9, "samples": 10000, ...}]

A row says what its figure depends on: network, number of samples, sampler, steps, guidance, and how often a batch asked
each part of the generator; a question with guidance is one, of twice the size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs import UserError
from data.held_out import HeldOutImages
from engine import world
from engine.agreement import with_one_answer
from evaluation.classes import ClassTable
from evaluation.command import with_progress
from evaluation.feature_network import open_network
from evaluation.fidelity import Fid
from evaluation.reconstruction import NO_FID
from evaluation.sample_grid import SampleGrid
from evaluation.samples import Pair
from model.generator.sampling import Sampling


@dataclass(frozen=True)
class Options:
    """What the command line may ask for. `sampling` is that of every guidance scale in `guidance`."""

    sampling: Sampling = field(default_factory=Sampling)
    guidance: tuple[float, ...] = (1.0,)
    num_samples: int = 10_000
    seed: int = 0
    batch_size: int = 64
    precision: str = "float32"  # of the generator's products
    fid: tuple[Path, ...] = ()
    data: tuple[str, ...] = ()
    limit: int | None = None  # of the pictures compared with
    classes: Path | None = None


class Generation:
    """One pass over the corpus, then one over the samples for every guidance scale."""

    def __init__(self, pair: Pair, options: Options) -> None:
        self.pair, self.options = pair, options
        source, config = pair.source, pair.source.config
        self.data = options.data or (config.data.train if config else ())
        self.fids = [Fid(open_network(path), pair.device) for path in options.fid]
        self.pictures: HeldOutImages | None = None
        if self.fids:
            if not self.data:
                raise UserError("FID compares with pictures: there is no run to name training shards; give --data")
            self.pictures = source.pictures(self.data, "--data" if options.data else "data.train", options.limit)
        self._is_corpus_ahead = True
        self.names = self._names()
        self.grid = SampleGrid(pair.generator.num_classes, options.num_samples)

    def judge(self, guidance: float) -> list[dict[str, Any]]:
        """A row of results for each network. A collective.

        Samples come first: what is wrong with a sampler shows before the pass over the corpus.
        """
        options, sampling = self.options, replace(self.options.sampling, guidance=guidance)
        with_one_answer(lambda: self._sample(sampling))
        if self._is_corpus_ahead:
            with_one_answer(self._look)
            self._is_corpus_ahead = False
        described = asdict(self.pair.generator.module.resolve_sampling(sampling))
        made = {"samples": options.num_samples, "precision": options.precision, "evaluations": self._evaluations()}
        row = described | made
        if not self.fids:
            return [row | {"network": NO_FID, "gfid": None}]
        return [row | {"network": fid.name, "gfid": fid.result()} for fid in self.fids]

    def bad_samples(self) -> Counter[str]:
        """Pictures that could not be compared with, by reason. A collective."""
        return sum(world.gather_objects(self.pictures.bad if self.pictures else Counter()), Counter())

    def _sample(self, sampling: Sampling) -> None:
        """This rank's share of the samples; those of the scale before are forgotten."""
        options = self.options
        numbers = np.arange(world.rank(), options.num_samples, world.world_size(), dtype=np.int64)
        self.pair.calls.clear()
        for fid in self.fids:
            fid.forget_fake()
        batches = self.pair.samples(numbers, sampling, options.seed, options.batch_size, options.precision)
        title = f"guidance {sampling.guidance:g}"
        for batch in with_progress(batches, title, -(-len(numbers) // options.batch_size)):
            self.grid.add(title, batch)
            for fid in self.fids:
                fid.add_fake(batch.images)

    def _look(self) -> None:
        """At this rank's share of the pictures that samples are compared with."""
        if self.pictures is not None:
            total = -(-len(self.pictures) // self.options.batch_size)
            for batch in with_progress(self.pictures.batches(self.options.batch_size), "real pictures", total):
                for fid in self.fids:
                    fid.add_real(batch.images.to(self.pair.device).float() / 255)
            self.pictures.close()

    def _evaluations(self) -> dict[str, float]:
        """How often a batch asked each part of the generator, on average. A collective."""
        calls = sum(world.gather_objects(self.pair.calls), Counter())
        return {name: count / calls["batches"] for name, count in calls.items() if name != "batches"}

    def _names(self) -> tuple[str, ...] | None:
        """Of --classes, or of a fitting classes.json beside the pictures compared with or the run's held-out ones."""
        given, num_classes = self.options.classes, self.pair.generator.num_classes
        for path in [given] if given else self._tables():
            names = ClassTable.read(path).names
            if len(names) >= num_classes:
                return names
            if given:
                raise UserError(
                    f"--classes {path} names {len(names)} classes, the generator has {num_classes}: give the table of "
                    "its corpus"
                )
        return None

    def _tables(self) -> list[Path]:
        config = self.pair.source.config
        shards = [Path(names[0]) for names in (self.data, config.data.held_out if config else ()) if names]
        beside = [(path if path.is_dir() else path.parent) / "classes.json" for path in shards]
        return [path for path in beside if path.is_file()]
