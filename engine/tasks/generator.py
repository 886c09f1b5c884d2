"""Training a generator on the latents of a tokenizer, as a TrainingTask.

    task = build_generator_task(config, ds_config, comm)
    result = task.step(next(task.data.batches(first_step=0)))

The model draws no random numbers: noise, times, hidden classes and orders are functions of (seed, step, position), made
ahead on the host (model/generator/draws.py), so a step is the same on any number of ranks. The run's weights are the
average.
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
from engine import distributed, zero
from engine.build import BuiltEngine, build_engine, fill_parameters, time_phases
from engine.checkpoint.contents import TrainState, replicated_ranges
from engine.checkpoint.tensor_ranges import MAIN, WHOLE, RangeReader, TensorRange
from engine.ema import WeightEma
from engine.optim import set_learning_rate
from engine.schedule import learning_rate
from engine.tasks.task import StepResult, TaskSetup, number_by_step
from model.generator.draws import DrawCounts, RandomDraws, draw
from model.generator.factory import block_classes, build_generator
from model.generator.tokens import LatentShape
from model.initialise import initialise_generator_parameter
from model.losses.comm import Comm
from profiling.cost.flops import FlopsComponent, StepFlops, generator_flops


@dataclass(frozen=True)
class GeneratorBatch:
    """Latents with labels, and the random numbers of their step."""

    latents: LatentBatch
    draws: RandomDraws
    step: int


class LatentBatches:
    """DataSource over a latent store: a thread reads latents and draws random numbers ahead."""

    def __init__(self, config: GeneratorConfig, comm: Comm, store: LatentStore, needs: DrawCounts) -> None:
        self._store, self._needs, self._seed = store, needs, config.seed
        samples = config.batch.samples
        self._loader = LatentLoader(store, config.seed, samples, config.latents.flip, comm.rank, comm.world_size)
        self._offset = 0
        self._ahead = RestartablePrefetcher(self.make_batch, config.system.loader.prefetch)

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[GeneratorBatch]:
        """Iterate over batches that a thread prepares ahead."""
        self._ahead.close()
        self._offset = offset
        return number_by_step(self._ahead.iterate(first_step + skipped_steps), skipped_steps)

    def make_batch(self, step: int) -> GeneratorBatch:
        """Read the latents of `step` of the data and draw its random numbers; page-locked where there is a GPU."""
        latents = self._loader.batch(step, self._offset)
        draws = draw(self._needs, self._seed, step, latents.positions_B)
        if torch.cuda.is_available():
            return GeneratorBatch(latents.pinned(), draws.pinned(), step)  # only from there a copy runs beside the host
        return GeneratorBatch(latents, draws, step)

    def sample_hash(self, batch: GeneratorBatch) -> int:
        """Sum of the hashes of the samples' positions."""
        return sum_hashes(hash_words(batch.latents.positions_B))

    def order_facts(self, position: int) -> dict[str, str]:
        """Return facts on the latent store and its order from `position` on."""
        return self._loader.facts(position)

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """None: a store is read whole, or not at all."""
        return ()

    def wait_seconds(self) -> float:
        """Return the seconds that steps waited for batches since the last call."""
        return self._ahead.wait_seconds

    def metrics(self) -> dict[str, float]:
        """Empty: a store has no bad samples."""
        return {}

    def close(self) -> None:
        """End the thread that makes batches, also where it waits for storage."""
        self._store.retries.stop()
        self._ahead.close()


class LatentsRecord:
    """Shape, classes, mean and deviation of the latents (Stateful); a resume with other latents is refused."""

    def __init__(self, store: LatentStore) -> None:
        self._directory = store.directory
        self._tensors = {
            "shape": torch.tensor(store.shape),
            "num_classes": torch.tensor([store.num_classes]),
            "mean": store.mean,
            "std": store.std,
        }

    def state_ranges(self) -> list[TensorRange]:
        """Return shape, number of classes, mean and standard deviation, on the first rank."""
        return replicated_ranges(self._tensors)

    def load_ranges(self, reader: RangeReader) -> None:
        """Raise UserError where the checkpoint's latents are others."""
        for name, own in self._tensors.items():
            if not torch.equal(reader.read(WHOLE, name), own):
                raise UserError(
                    f"--resume: latents.train={self._directory} has another {name} than the run's latents had: "
                    "a run keeps its latents; give the directory it began with"
                )

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """List them all."""
        return list(self._tensors.items())

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """Empty."""
        return []


class GeneratorTask:
    """Training of one generator with its own loss (engine/tasks/task.py, TrainingTask)."""

    def __init__(
        self, config: GeneratorConfig, comm: Comm, device: torch.device, store: LatentStore, built: BuiltEngine
    ) -> None:
        self.config, self._store, self._engine = config, store, built.engine
        self._average = WeightEma(self._engine, MAIN)
        children = {name: "generator" for name, _ in self._engine.module.named_children()}
        phases = time_phases(config, device, self._engine, children, {"ema": (self._average, "update")})
        attention = built.choices["attention"].split()[0]
        self.setup = TaskSetup(config, comm, device, phases, built.choices, attention, (built.guard,))
        self.data = LatentBatches(config, comm, store, self._engine.module.draw_counts)
        self._latents_record = LatentsRecord(store)

    def describe(self) -> str:
        """Describe the generator and its latents."""
        count = sum(zero.full_shape(parameter).numel() for parameter in self._engine.module.parameters())
        store, made_by = self._store, (self.config.latents.tokenizer or "unknown")[:16]
        shape = " x ".join(map(str, store.shape))
        return (
            f"generator: {count / 1e6:.1f}M parameters\n"
            f"latents: {store.num_samples:,} of {shape}, {store.num_classes} classes ({store.directory}, tokenizer "
            f"{made_by})"
        )

    def step(self, batch: GeneratorBatch) -> StepResult:
        """Forward, backward, AdamW, average. A collective."""
        phases, device = self.setup.phases, self.setup.device
        phases.next_step()
        rate = learning_rate(batch.step, self.config)
        set_learning_rate(self._engine, rate)
        with phases("inputs"):
            latents_BLhw = batch.latents.latents_BLhw.to(device, non_blocking=True)
            labels_B = batch.latents.labels_B.to(device, non_blocking=True)
            draws = batch.draws.to(device)
        losses = self._engine(latents_BLhw, labels_B, draws)
        self._engine.backward(losses["total"])
        self._engine.step()
        self._average.update(self.config.ema)
        return StepResult(
            losses={name: loss.detach() for name, loss in losses.items()},
            schedule={"learning_rate": rate},
            grad_norm=self._engine.get_global_grad_norm(),
            counted={},
        )

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """FLOPs of a step: backward is twice forward; full activation checkpointing runs the blocks forward again."""
        samples = self.config.batch.samples // self.setup.comm.world_size
        shape, classes = LatentShape(*self._store.shape), self._store.num_classes
        forward = generator_flops(self.config.generator, shape, classes, samples)
        again = forward if self.config.system.activation_checkpointing == "full" else 0.0
        return StepFlops.of([FlopsComponent("generator", "shared", forward, 2 * forward, again)], savings={})

    def metrics(self) -> dict[str, float]:
        """Return no metrics beside the losses."""
        return {}

    def images(self) -> dict[str, Tensor]:
        """Empty: pixels need the tokenizer (`python -m evaluation.generate`)."""
        return {}

    def train_state(self) -> TrainState:
        """Return the engine, its average, the window of gradient norms and the record of the latents."""
        return TrainState({MAIN: self._engine}, (self._average, *self.setup.guards, self._latents_record))


def build_generator_task(config: GeneratorConfig, ds_config: dict[str, Any], comm: Comm) -> GeneratorTask:
    """Build the task on this rank; a collective. Raises UserError for a latent store that cannot serve the run."""
    store, device = LatentStore(config.latents.train, config.system.loader.tries), distributed.device()
    shape, section = LatentShape(*store.shape), config.generator
    make_model = partial(build_generator, section, shape, store.num_classes)
    with torch.device("meta"):
        leaves = tuple(block_classes(make_model("sdpa")))

    def initialise(model: Any) -> str:
        fill_parameters(
            model.named_parameters(),
            lambda name, tensor: initialise_generator_parameter(name, tensor, section, config.seed),
        )
        return f"drawn (seed={config.seed})"

    built = build_engine(config, ds_config, device, make_model=make_model, initialise=initialise, block_classes=leaves)
    return GeneratorTask(config, comm, device, store, built)
