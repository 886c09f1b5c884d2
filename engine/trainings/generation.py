"""Training a generator as the loop sees it: latents and random numbers in, the generator's own loss out.

    training = generation(config, ds_config, comm)
    record = training.step(next(training.batches(first_step=0)))

The model draws nothing: noise, times, hidden classes and orders are numbers of (seed, step, position), made ahead on
the host (model/generator/draws.py), so a step is the same on any number of ranks. The run's weights are the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import UserError
from configs.generator import GeneratorConfig
from data.batch import RestartablePrefetcher
from data.durable_files import AppendOnlyFile
from data.hashing import hash_words
from data.latents.loader import LatentBatch, LatentLoader
from data.latents.store import LatentStore
from data.order import sum_hashes
from engine import assemble, world, zero
from engine.average import Average
from engine.checkpoint.pieces import MAIN
from engine.optim import set_learning_rate
from engine.schedule import learning_rate
from engine.training import Kept, renumbered
from model.generator.draws import RandomDraws, draw
from model.generator.factory import block_classes, build_generator
from model.generator.tokens import LatentShape
from model.initialise import initialise_generator_parameter
from model.losses.comm import Comm
from profiling.cost.flops import FlopsComponent, StepFlops, generator_flops
from profiling.instruments.phases import PhaseTimer


@dataclass(frozen=True)
class GenerationRecord:
    """What one step leaves behind on this rank (engine/training.py, Record)."""

    losses: dict[str, Tensor]
    schedule: dict[str, float]
    grad_norm: float | Tensor
    counted: dict[str, float]


@dataclass(frozen=True)
class Step:
    """A batch with its random numbers."""

    batch: LatentBatch
    draws: RandomDraws
    step: int


class GeneratorTraining:
    """A Training (engine/training.py)."""

    def __init__(
        self, config: GeneratorConfig, comm: Comm, device: torch.device, store: LatentStore, started: assemble.Started
    ) -> None:
        self.config, self.comm, self.device, self.choices = config, comm, device, started.choices
        self._store, self._engine = store, started.engine
        self._average, self.judges = Average(self._engine, MAIN), (started.judge,)
        self.phases: PhaseTimer = assemble.timed(
            config, device, self._engine, _children(self._engine.module), {"ema": (self._average, "follow")}
        )
        samples = config.batch.samples
        self._loader = LatentLoader(store, config.seed, samples, config.latents.flip, comm.rank, comm.world_size)
        self._offset = 0
        self._steps = RestartablePrefetcher(self._make, config.system.loader.prefetch)

    @property
    def backend(self) -> str:
        """Of attention."""
        return self.choices["attention"].split()[0]

    def describe(self) -> str:
        """What is trained on what."""
        count = sum(zero.full_shape(parameter).numel() for parameter in self._engine.module.parameters())
        store, made_by = self._store, (self.config.latents.tokenizer or "unknown")[:16]
        shape = " x ".join(map(str, store.shape))
        return (
            f"generator: {count / 1e6:.1f}M parameters\n"
            f"latents: {store.num_samples:,} of {shape}, {store.num_classes} classes ({store.directory}, tokenizer "
            f"{made_by})"
        )

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[Step]:
        """Iterate over batches that a thread makes ahead."""
        self._steps.close()
        self._offset = offset
        return renumbered(self._steps.iterate(first_step + skipped_steps), skipped_steps)

    def samples(self, batch: Step) -> int:
        """By their positions."""
        return sum_hashes(hash_words(batch.batch.positions_B))

    def corpus(self, position: int) -> dict[str, str]:
        """Return the facts of the latent store's order from `position` on."""
        return self._loader.facts(position)

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """None: latents are read whole, or not at all."""
        return ()

    def step(self, batch: Step) -> GenerationRecord:
        """Forward, backward, AdamW, average. A collective."""
        self.phases.next_step()
        given = batch.batch
        rate = learning_rate(batch.step, self.config)
        set_learning_rate(self._engine, rate)
        with self.phases("inputs"):
            latents_BLhw = given.latents_BLhw.to(self.device, non_blocking=True)
            labels_B = given.labels_B.to(self.device, non_blocking=True)
            draws = batch.draws.to(self.device)
        losses = self._engine(latents_BLhw, labels_B, draws)
        self._engine.backward(losses["total"])
        self._engine.step()
        self._average.follow(self.config.ema)
        return GenerationRecord(
            losses={name: loss.detach() for name, loss in losses.items()},
            schedule={"learning_rate": rate},
            grad_norm=self._engine.get_global_grad_norm(),
            counted={},
        )

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """Backward is twice forward; with full activation checkpointing the blocks run forward once more."""
        samples = self.config.batch.samples // self.comm.world_size
        shape, classes = LatentShape(*self._store.shape), self._store.num_classes
        forward = generator_flops(self.config.generator, shape, classes, samples)
        again = forward if self.config.system.activation_checkpointing == "full" else 0.0
        return StepFlops.of([FlopsComponent("generator", "shared", forward, 2 * forward, again)], savings={})

    def wait_seconds(self) -> float:
        """Of the step for latents and their numbers."""
        return self._steps.wait_seconds

    def health(self) -> dict[str, float]:
        """Nothing beside the losses."""
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """None: pixels need the tokenizer (`python -m evaluation.generate`)."""
        return {}

    def kept(self) -> Kept:
        """The engine, the average, and what a file of weights says of its latents."""
        store = self._store
        described = {"shape": torch.tensor(store.shape), "num_classes": torch.tensor([store.num_classes])}
        followers = (self._average, *self.judges)
        return Kept({MAIN: self._engine}, followers, described | {"mean": store.mean, "std": store.std})

    def restored(self, whole: Mapping[str, Tensor]) -> None:
        """Refuses to go on with other latents."""
        for name, ours in self.kept().whole.items():
            if not torch.equal(whole[name], ours):
                raise UserError(
                    f"--resume: latents.train={self._store.directory} has another {name} than the run's latents had: "
                    "a run keeps its latents; give the directory it began with"
                )

    def close(self) -> None:
        """Ends the thread that makes batches, also where it waits for storage."""
        self._store.retries.stop()
        self._steps.close()

    def _make(self, step: int) -> Step:
        batch = self._loader.batch(step, self._offset)
        draws = draw(self._engine.module.draw_counts, self.config.seed, step, batch.positions_B)
        if torch.cuda.is_available():
            return Step(batch.pinned(), draws.pinned(), step)  # only from there a copy runs beside the host
        return Step(batch, draws, step)


def generation(config: GeneratorConfig, ds_config: dict[str, Any], comm: Comm) -> GeneratorTraining:
    """Assembled on this rank; a collective. Raises UserError for a store that cannot serve the run."""
    store, device = LatentStore(config.latents.train, config.system.loader.tries), world.device()
    shape, section = LatentShape(*store.shape), config.generator
    make = partial(build_generator, section, shape, store.num_classes)
    with torch.device("meta"):
        kinds = tuple(block_classes(make("sdpa")))

    def fill(model: Any) -> str:
        assemble.fill_parameters(
            model.named_parameters(),
            lambda name, tensor: initialise_generator_parameter(name, tensor, section, config.seed),
        )
        return f"drawn (seed={config.seed})"

    started = assemble.start(config, ds_config, device, make=make, fill=fill, leaves=kinds)
    return GeneratorTraining(config, comm, device, store, started)


def _children(model: torch.nn.Module) -> dict[str, str]:
    """Every child is the generator."""
    return {name: "generator" for name, _ in model.named_children()}
