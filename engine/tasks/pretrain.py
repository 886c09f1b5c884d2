"""Pre-training a tokenizer as a TrainingTask: image-text shards, engine/step.py's step, reconstructions to look at.

task = build_pretrain_task(config, ds_config, comm, run_dir, is_resumed=False)
result = task.step(next(task.data.batches(first_step=0)))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Config, UserError
from data.batch import Batch
from data.captions import CaptionEncoder
from data.loader import BatchLoader
from engine import distributed
from engine.build import PretrainParts, build_pretraining
from engine.checkpoint.contents import TrainState
from engine.ema import CentreState
from engine.reporting.images import latent_colours, reconstructions
from engine.step import SAVED_TOKENS, PretrainResult, train_step
from engine.tasks.shards import ShardData
from engine.tasks.task import TaskSetup
from model.describe import describe
from model.imagenet import denormalise
from model.losses.comm import Comm
from model.outputs import RecOutputs
from model.packing import RankBatchSizes
from profiling.cost.flops import StepFlops
from profiling.cost.step_flops import step_flops


class PretrainTask:
    """Joint training of clip, ssl and rec (engine/tasks/task.py, TrainingTask)."""

    def __init__(self, config: Config, parts: PretrainParts, loader: BatchLoader) -> None:
        self.config, self.parts, self.data = config, parts, ShardData[Batch](loader)
        attention: str = parts.engine.module.attention
        self.setup = TaskSetup(
            config, parts.comm, parts.device, parts.phases, parts.choices, attention, (parts.grad_norm_guard,)
        )
        self.rows: RankBatchSizes = parts.engine.module.rows
        self._centre = CentreState(parts.centres)
        self._last_rec: RecOutputs | None = None  # of the last step, for images

    def describe(self) -> str:
        """Describe the corpus, and the model as the table of model/describe.py."""
        return f"{self.data.describe()}\n{describe(self.config, self.rows)}"

    def step(self, batch: Batch) -> PretrainResult:
        """Take the step of engine/step.py; keep its centre and its reconstructions."""
        result = train_step(self.parts, batch, self._centre.value, self.config)
        self._centre.value, self._last_rec = result.centres, result.outputs.rec
        return result

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """FLOPs of a step with as many caption tokens as packing left."""
        tokens = (1 - counted.get(SAVED_TOKENS, 0.0)) * self.rows.clip * self.config.model.text.context
        return step_flops(self.config, self.rows, tokens, backend=self.setup.attention, device=self.setup.device.type)

    def metrics(self) -> dict[str, float]:
        """Return each objective's fraction of the trunk's gradient. A collective."""
        return self.parts.grad_fractions.read(self.setup.comm)

    def images(self) -> dict[str, Tensor]:
        """Return reconstructions and latent colours of this rank's rec rows."""
        rec = self._last_rec
        if rec is None:
            return {}
        target, recon = denormalise(rec.target.detach()), denormalise(rec.recon.detach())
        scale = target.shape[-1] // rec.latent.shape[-1]
        return {
            "reconstructions": reconstructions(target, recon),
            "latents": latent_colours(rec.latent.detach(), scale),
        }

    def train_state(self) -> TrainState:
        """Return the engine, the averages, the window of gradient norms and the centre."""
        return self.parts.train_state(self._centre)


def build_pretrain_task(
    config: Config, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool
) -> PretrainTask:
    """Build the task on this rank; a collective.

    The loader comes before the model: on a large run a mistake in the data is reported minutes earlier.
    """
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    check_vocabulary(encoder, config)
    loader = BatchLoader(
        config,
        encoder,
        rank=comm.rank,
        world_size=comm.world_size,
        bad_log=run_dir / "bad_samples.jsonl",
        corpus_file=run_dir / "corpus.json",
        is_resumed=is_resumed,
        gather_objects=distributed.gather_objects,
    )
    try:
        return PretrainTask(config, build_pretraining(config, ds_config, comm, is_resumed), loader)
    except BaseException:
        loader.close()
        raise


def check_vocabulary(encoder: CaptionEncoder, config: Config) -> None:
    """Raise UserError where the tokenizer has token ids that the text tower has no embedding for."""
    if config.objectives.clip.weight and encoder.vocab_size > config.model.text.vocab:
        raise UserError(
            f"{config.data.tokenizer} has {encoder.vocab_size} tokens but model.text.vocab={config.model.text.vocab}: "
            "every token needs an embedding; raise model.text.vocab"
        )
