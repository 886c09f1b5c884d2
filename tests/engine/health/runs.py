"""Whole runs of every kind on the engine's own loop, on drawn data of which some is spoilt; found by name in new
processes.

    run_ranks(runs.train, 2, config, run_dir, Spoilt({5: "nan"}))       # what the run's last checkpoint holds
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from configs import Config, DecoderGan, RunConfig
from configs.deepspeed import load_ds_config
from data.batch import RestartablePrefetcher
from data.order import Order
from engine import trainer
from engine.build import build_pretraining
from engine.checkpoint import reading
from engine.checkpoint.tensor_ranges import RangeReader
from engine.tasks.generator import GeneratorTask, build_generator_task
from engine.tasks.pretrain import PretrainTask
from engine.tasks.shards import ShardData
from engine.tasks.task import TrainingTask
from model.losses.comm import Comm
from tests.engine.ranks import DEEPSPEED
from tests.engine.tasks import decoder_gan_runs
from tests.tiny import random_batch

CORPUS = Order([64], 1, 1, 0)


@dataclass(frozen=True)
class Spoilt:
    """What is wrong with the data: places (steps of data) with pictures that are "nan" or "huge", on rank 1 alone; or
    places that are left out, those after them moving up."""

    places: Mapping[int, str] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()

    def moved(self, place: int) -> int:
        """Where the data of a place is once what is left out is gone."""
        for gone in sorted(self.left_out):
            place += gone <= place
        return place

    def spoil(self, values: Tensor, place: int, rank: int) -> Tensor:
        """Pixels, or latents."""
        how = self.places.get(place) if rank == 1 else None
        if how is None:
            return values
        return torch.full_like(values.float(), torch.nan) if how == "nan" else values.float() * 1e4


class Drawn:
    """A loader over drawn batches."""

    def __init__(self, make: Callable[[int], Any], order: Order) -> None:
        self._ahead: RestartablePrefetcher[Any] = RestartablePrefetcher(make, 2)
        self.bad_samples = SimpleNamespace(counts=Counter(), left_out=Counter())
        shards = SimpleNamespace(names=("drawn",))
        self.reader = SimpleNamespace(shards=shards, order=order, logs=(), summary=lambda: "corpus: drawn")
        self.wait_seconds = 0.0

    def iterate(self, start: int, offset: int) -> Iterator[Any]:
        assert offset == 0, "the batch is the same"
        return self._ahead.iterate(start)

    def close(self) -> None:
        self._ahead.close()


def train(
    comm: Comm,
    config: RunConfig,
    run_dir: Path,
    spoilt: Spoilt,
    resume: bool = False,
    stage: str = "zero3",
    corpus: Order = CORPUS,
    allowed: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The run to its end, or what it raises; what its last checkpoint holds."""
    ds_config = load_ds_config(DEEPSPEED / f"{stage}.json", config, comm.world_size)

    def assembled(*_: object) -> TrainingTask:
        return _assembled(config, ds_config, comm, spoilt, stage, resume, corpus)

    vars(trainer)["build_task"] = assembled
    config = config.model_copy(update={"system": config.system.model_copy(update={"run_dir": str(run_dir)})})
    assert trainer.train(config, ds_config, comm, resume, allowed) == 0
    return state_of(run_dir)


def _assembled(
    config: RunConfig, ds_config: dict[str, Any], comm: Comm, spoilt: Spoilt, stage: str, resume: bool, corpus: Order
) -> TrainingTask:
    def images(batch: Any, place: int) -> Any:
        moved = spoilt.moved(place)
        keys = tuple(f"{moved}/{key}" for key in batch.keys)
        return replace(batch, images=spoilt.spoil(batch.images, moved, comm.rank), step=place, keys=keys)

    if isinstance(config, Config):
        draw = lambda place: random_batch(config, spoilt.moved(place), comm.rank, comm.world_size)  # noqa: E731
        loader: Any = Drawn(lambda place: images(draw(place), place), corpus)
        return PretrainTask(config, build_pretraining(config, ds_config, comm, resume), loader)
    if isinstance(config, DecoderGan):
        training = decoder_gan_runs.build(config, comm, stage)
        loader = Drawn(
            lambda place: images(decoder_gan_runs.pictures(config, spoilt.moved(place), comm), place),
            corpus,
        )
        training.data = ShardData(loader)
        return training
    generator = build_generator_task(config, ds_config, comm)  # type: ignore[arg-type]
    return _with_spoilt_latents(generator, spoilt, comm)


def _with_spoilt_latents(training: GeneratorTask, spoilt: Spoilt, comm: Comm) -> GeneratorTask:
    make = vars(training.data._ahead)["_make"]

    def spoilt_step(place: int) -> Any:
        step = make(spoilt.moved(place))
        latents = spoilt.spoil(step.latents.latents_BLhw, spoilt.moved(place), comm.rank)
        return replace(step, latents=replace(step.latents, latents_BLhw=latents), step=place)

    vars(training.data._ahead)["_make"] = spoilt_step
    return training


def state_of(run_dir: Path) -> dict[str, Tensor]:
    """All vectors of the last checkpoint."""
    pieces = RangeReader(reading.latest_readable(run_dir / "checkpoints"))
    return {f"{key}/{name}": pieces.read(key, name) for key, name in sorted(vars(pieces)["_where"])}


def reports(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same, bit by bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
