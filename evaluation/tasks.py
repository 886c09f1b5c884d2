"""The tasks by name, and what each is made of.

    setup = Setup(source, Options(tasks=("zero_shot", "knn")), device)
    tasks = {name: TASKS[name](setup) for name in options.tasks}

A new task is a class with `add` and `result` (evaluation/outcome.py) and one line in TASKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from configs import UserError
from data.held_out import HeldOutImages
from engine import world
from engine.agreement import with_one_answer
from evaluation.bank import Bank
from evaluation.classes import ClassTable
from evaluation.command import with_progress
from evaluation.feature_network import PerceptualNetwork, open_network, open_perceptual
from evaluation.knn import NearestNeighbours
from evaluation.learners import Corpora
from evaluation.linear_probe import LinearProbe
from evaluation.outcome import Task
from evaluation.products import Products
from evaluation.reconstruction import Reconstruction
from evaluation.source import Source
from evaluation.zero_shot import ZeroShot, classifier
from model.weights import digest


@dataclass(frozen=True)
class Options:
    """What the command line may ask for beyond the source; empty or None: what the run's config says."""

    tasks: tuple[str, ...]
    data: tuple[str, ...] = ()
    train_data: tuple[str, ...] = ()
    classes: Path | None = None
    fid: tuple[Path, ...] = ()
    lpips: Path | None = None
    limit: int | None = None
    batch_size: int = 128


class Setup:
    """What tasks are built from: tokenizer, corpora, files. Whatever is missing is a UserError when first needed."""

    def __init__(self, source: Source, options: Options, device: torch.device, folder: Path) -> None:
        self.source, self.options, self.device, self.folder = source, options, device, folder
        self.data = options.data or (source.config.data.held_out if source.config else ())
        if not self.data:
            raise UserError(
                "nothing to evaluate on: data.held_out is empty, or there is no run to have one; name labelled shards "
                "with --data"
            )

    @cached_property
    def held_out(self) -> HeldOutImages:
        """The pictures that tasks are asked about, opened once. UserError for missing shards or none."""
        classes = self._classes_file if self.options.classes or self._classes_file.is_file() else None
        return self._pictures(self.data, "--data" if self.options.data else "data.held_out", classes)

    @cached_property
    def table(self) -> ClassTable:
        """Of --classes, or of the classes.json beside the first shard."""
        return ClassTable.read(self._classes_file)

    @property
    def _classes_file(self) -> Path:
        shards = Path(self.data[0])
        return self.options.classes or (shards if shards.is_dir() else shards.parent) / "classes.json"

    @cached_property
    def corpora(self) -> Corpora:
        """Of the tasks that learn. The training shards are opened now: a wrong name should show before a long pass."""
        train_data = self.options.train_data or (self.source.config.data.train if self.source.config else ())
        if not train_data:
            raise UserError("a probe learns before it is asked: name labelled training shards with --train-data")
        key = "--train-data" if self.options.train_data else "data.train"
        # With the class table of the held-out pictures, so that class names get the same numbers in both.
        training = self._pictures(train_data, key, self.held_out.classes.path)
        return Corpora(Bank(len(self.held_out), self.folder), lambda: self._filled(training), self.device)

    def batches(self, pictures: HeldOutImages, title: str) -> Iterator[Products]:
        """This rank's pictures as the tokenizer sees them, with a progress bar where somebody looks."""
        batch_size = self.options.batch_size
        with closing(pictures):
            for batch in with_progress(pictures.batches(batch_size), title, -(-len(pictures) // batch_size)):
                if LABELLED_TASKS & set(self.options.tasks):
                    pictures.classes.require_known()
                images, labels = batch.images.to(self.device).float() / 255, batch.labels.to(self.device)
                yield Products(self.source.tokenizer, images, labels, batch.positions)

    def _filled(self, training: HeldOutImages) -> Bank:
        bank = Bank(len(training), self.folder)

        def fill() -> None:
            for batch in self.batches(training, "training features"):
                bank.add(batch)

        with_one_answer(fill)
        return bank

    def _pictures(self, patterns: Sequence[str], key: str, classes: Path | None) -> HeldOutImages:
        return self.source.pictures(patterns, key, self.options.limit, classes)


def _zero_shot(setup: Setup) -> Task:
    weights_KE = classifier(setup.source.tokenizer, setup.source.encoder(), setup.table.prompts, setup.device)
    return ZeroShot(weights_KE, setup.table, world.Ranks())


def _linear_probe(setup: Setup) -> Task:
    return LinearProbe(setup.corpora)


def _knn(setup: Setup) -> Task:
    return NearestNeighbours(setup.corpora)


def _reconstruction(setup: Setup) -> Task:
    networks = [open_network(path) for path in setup.options.fid]
    return Reconstruction(networks, _perceptual(setup), setup.device)


def _perceptual(setup: Setup) -> PerceptualNetwork | None:
    """Of --lpips; else what the run was trained with, if it is there."""
    config = setup.source.config
    if setup.options.lpips is not None:
        return open_perceptual(setup.options.lpips, "--lpips")
    trained_with = config.objectives.rec.lpips_weights if config is not None else None
    if config is None or not trained_with or not Path(trained_with).is_file():
        return None
    if config.objectives.rec.lpips_sha256 not in (None, digest(Path(trained_with))):
        raise UserError(
            f"objectives.rec.lpips_weights={trained_with} is not the file the run was trained with (sha256 "
            f"{config.objectives.rec.lpips_sha256}): distances of two networks are not comparable; give the "
            "right file with --lpips"
        )
    return open_perceptual(trained_with, "objectives.rec.lpips_weights")


TASKS: dict[str, Callable[[Setup], Task]] = {
    "zero_shot": _zero_shot,
    "linear_probe": _linear_probe,
    "knn": _knn,
    "reconstruction": _reconstruction,
}


LABELLED_TASKS = frozenset(["zero_shot", "linear_probe", "knn"])  # tasks that need labels


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names, all known, each once."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: {name!r} is not one of {', '.join(TASKS)}")
    return tuple(dict.fromkeys(names))
