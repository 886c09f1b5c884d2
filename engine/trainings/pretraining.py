"""Pre-training a tokenizer as the loop sees it: shards in, engine/step.py's step, reconstructions to look at.

training = pretraining(config, ds_config, comm, run_dir, resume=False)
record = training.step(next(training.batches(first_step=0)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Config, UserError
from data.batch import Batch
from data.captions import CaptionEncoder
from data.loader import BatchLoader
from engine import world
from engine.assemble import Assembly, assemble
from engine.health.judge import Judge
from engine.report.pictures import latent_colours, reconstructions
from engine.step import StepRecord, train_step
from engine.training import Kept
from engine.trainings.shard_fed import ShardFed
from model.describe import describe
from model.imagenet import denormalise
from model.losses.comm import Comm
from model.losses.total import TeacherCentres
from model.outputs import RecOutputs
from model.packing import RankBatchSizes
from profiling.cost.flops import StepFlops
from profiling.cost.step_flops import step_flops

SAVED = "speed/caption_tokens_saved"


class Pretraining(ShardFed[Batch]):
    """A Training (engine/training.py). What evolves outside the engine: the centre of the centring targets."""

    def __init__(self, config: Config, parts: Assembly, loader: BatchLoader) -> None:
        super().__init__(loader)
        self.config, self.parts = config, parts
        self.comm, self.device, self.phases, self.choices = parts.comm, parts.device, parts.phases, parts.choices
        self.rows: RankBatchSizes = parts.engine.module.rows
        self._centres = parts.centres
        self._shown: RecOutputs | None = None  # of the last step

    @property
    def backend(self) -> str:
        """Of attention, as the model was built with it."""
        name: str = self.parts.engine.module.attention
        return name

    def describe(self) -> str:
        """Describe the corpus, and the model as the table of model/describe.py."""
        return f"{self.describe_corpus()}\n{describe(self.config, self.rows)}"

    @property
    def judges(self) -> Sequence[Judge]:
        """Of the one engine's steps."""
        return (self.parts.judge,)

    def step(self, batch: Batch) -> StepRecord:
        """engine/step.py's."""
        record = train_step(self.parts, batch, self._centres, self.config)
        self._centres, self._shown = record.centres, record.outputs.rec
        return record

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """With as many caption tokens as packing left."""
        tokens = (1 - counted.get(SAVED, 0.0)) * self.rows.clip * self.config.model.text.context
        return step_flops(self.config, self.rows, tokens, backend=self.backend, device=self.device.type)

    def health(self) -> dict[str, float]:
        """Bad samples, and the objectives' shares of the gradient. A collective."""
        return super().health() | self.parts.shares.read(self.comm)

    def pictures(self) -> dict[str, Tensor]:
        """Reconstructions and latent colours of this rank's rec rows."""
        rec = self._shown
        if rec is None:
            return {}
        target, recon = denormalise(rec.target.detach()), denormalise(rec.recon.detach())
        scale = target.shape[-1] // rec.latent.shape[-1]
        return {
            "reconstructions": reconstructions(target, recon),
            "latents": latent_colours(rec.latent.detach(), scale),
        }

    def kept(self) -> Kept:
        """Of the assembly, with the centres of now."""
        return self.parts.kept(self._centres)

    def restored(self, whole: Mapping[str, Tensor]) -> None:
        """Takes the centres."""
        if whole:
            self._centres = TeacherCentres(**{name: centre.to(self.device) for name, centre in whole.items()})


def pretraining(config: Config, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool) -> Pretraining:
    """Assembled on this rank; a collective. The loader comes before the model: on a large run a mistake in the data is
    told minutes earlier."""
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
        gather_objects=world.gather_objects,
    )
    try:
        return Pretraining(config, assemble(config, ds_config, comm, is_resumed), loader)
    except BaseException:
        loader.close()
        raise


def check_vocabulary(encoder: CaptionEncoder, config: Config) -> None:
    """Refuses a tokenizer whose ids the text tower has no embedding for."""
    if config.objectives.clip.weight and encoder.vocab_size > config.model.text.vocab:
        raise UserError(
            f"{config.data.tokenizer} has {encoder.vocab_size} tokens but model.text.vocab={config.model.text.vocab}: "
            "every token needs an embedding; raise model.text.vocab"
        )
