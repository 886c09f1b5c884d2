"""Stage 2 as the loop sees it: pictures in, engine/trainings/decoder_step.py's step, reconstructions before and after.

training = decoder_gan(config, ds_config, comm, run_dir, is_resumed=False)
record = training.step(next(training.batches(first_step=0)))

Two DeepSpeed engines of one ZeRO stage: encoder, bottleneck and decoder in the first, of which the decoder alone is
trained, the discriminator in the second. The frozen weights come from the tokenizer's file at every start, resumed or
not; checkpoints hold what moves: the decoder, its average, the discriminator, both optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import DecoderGan
from configs.model import Model
from configs.run import Optim
from data.loader import ImageBatch, ImageLoader
from engine import world
from engine.assemble import fill_parameters, start, timed
from engine.average import Average
from engine.checkpoint.pieces import MAIN
from engine.health.judge import Judge
from engine.report.pictures import reconstructions
from engine.report.timing import TimedComm
from engine.training import Kept
from engine.trainings.decoder_step import JUDGES, LISTENS, DecoderAssembly, DecoderRecord, decoder_step
from engine.trainings.frozen_tokenizer import described, initial_decoder
from engine.trainings.shard_fed import ShardFed
from model.block import Block
from model.decoder import DecoderStage, DecoderStageOutputs
from model.describe import describe_decoder_gan
from model.imagenet import denormalise
from model.losses.comm import Comm
from model.losses.gan import PatchGan, initialise_discriminator
from model.losses.perceptual import LpipsDistance
from model.tokenizer import decode_pixels
from model.weights import open_weights
from profiling.cost.flops import StepFlops
from profiling.cost.step_flops import decoder_gan_flops

DISCRIMINATOR = "discriminator"
SHOWN = 8  # pictures


class DecoderTraining(ShardFed[ImageBatch]):
    """A Training (engine/training.py)."""

    def __init__(
        self,
        config: DecoderGan,
        model: Model,
        parts: DecoderAssembly,
        choices: dict[str, str],
        loader: ImageLoader,
    ) -> None:
        super().__init__(loader)
        self.config, self.model, self.parts, self.choices = config, model, parts, choices
        self.comm, self.device, self.phases = parts.comm, parts.device, parts.phases
        self._shown: DecoderStageOutputs | None = None  # of the last step

    @property
    def backend(self) -> str:
        """Of the decoder's attention, resolved."""
        name: str = self.parts.engine.module.decoder.blocks[0].attn.backend
        return name

    def describe(self) -> str:
        """Describe the corpus, and the model as the table of model/describe.py."""
        return f"{self.describe_corpus()}\n{describe_decoder_gan(self.config, self.model)}"

    @property
    def judges(self) -> Sequence[Judge]:
        """Of the decoder's steps and of the discriminator's: each is judged by its own gradient."""
        return self.parts.judges

    def step(self, batch: ImageBatch) -> DecoderRecord:
        """engine/trainings/decoder_step.py's."""
        record = decoder_step(self.parts, batch, self.config)
        self._shown = record.outputs
        return record

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """With the shares of the steps in which the discriminator took part."""
        took_part = counted.get(LISTENS, 0.0), counted.get(JUDGES, 0.0)
        return decoder_gan_flops(self.config, self.model, self.comm.world_size, *took_part, backend=self.backend)

    def pictures(self) -> dict[str, Tensor]:
        """Three rows: originals, what stage 1's decoder made of them, what the last step's did."""
        if self._shown is None:
            return {}
        shown = self._shown
        target, recon, latent = (x.detach()[:SHOWN] for x in (shown.target, shown.recon, shown.latent))
        before = decode_pixels(initial_decoder(self.config, self.model).to(self.device), latent.float())
        return {"reconstructions": reconstructions(denormalise(target), before, denormalise(recon))}

    def kept(self) -> Kept:
        """Both engines and the decoder's average."""
        engines = {MAIN: self.parts.engine, DISCRIMINATOR: self.parts.discriminator}
        return Kept(engines, (self.parts.average, *self.parts.judges))

    def restored(self, whole: Mapping[str, Tensor]) -> None:
        """Nothing: all that moves is in engines and average."""


def decoder_gan(
    config: DecoderGan, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool
) -> DecoderTraining:
    """Assembled on this rank, the decoder as stage 1 left it; a collective. A resumed run loads a checkpoint next."""
    loader = ImageLoader(
        config.data,
        config.views,
        config.batch.images,
        config.seed,
        config.system.loader,
        rank=comm.rank,
        world_size=comm.world_size,
        bad_log=run_dir / "bad_samples.jsonl",
        corpus_file=run_dir / "corpus.json",
        is_resumed=is_resumed,
        gather_objects=world.gather_objects,
    )
    try:
        model = described(config)
        parts, choices = assemble(config, model, ds_config, comm)
        return DecoderTraining(config, model, parts, choices, loader)
    except BaseException:
        loader.close()
        raise


def assemble(
    config: DecoderGan, model: Model, ds_config: dict[str, Any], comm: Comm
) -> tuple[DecoderAssembly, dict[str, str]]:
    """The two engines and what goes with them, and what every "auto" became; a collective."""
    device = world.device()
    stage = start(
        config,
        ds_config,
        device,
        make=lambda attention: DecoderStage(model, attention),
        fill=lambda built: _fill_from_file(built, config),
        leaves=(Block,),
    )
    critic = start(
        config,
        ds_config | {"gradient_clipping": config.discriminator.clip_norm},
        device,
        make=lambda attention: PatchGan(config.discriminator),
        fill=lambda built: _draw(built, config.seed),
        leaves=(),
        learning=_learning(config),
        name=DISCRIMINATOR,
    )
    average = Average(stage.engine, MAIN)
    calls = {
        "decoder": (stage.engine.module.decoder, "tokens"),
        "ema": (average, "follow"),
        "backward": (critic.engine, "backward"),
        "optimizer": (critic.engine, "step"),
    }
    phases = timed(config, device, stage.engine, {"trunk": "trunk"}, calls)
    parts = DecoderAssembly(
        engine=stage.engine,
        discriminator=critic.engine,
        average=average,
        judges=(stage.judge, critic.judge),
        comm=TimedComm(comm, phases),
        perceptual=_perceptual(config, device),
        device=device,
        phases=phases,
    )
    return parts, stage.choices | {"discriminator": critic.choices["weights"]}


def _fill_from_file(stage: DecoderStage, config: DecoderGan) -> str:
    path = Path(config.tokenizer.weights)
    with open_weights(path) as stored:

        def fill(name: str, tensor: Tensor) -> None:
            tensor.copy_(stored.get_tensor(name))

        fill_parameters(stage.named_parameters(), fill)
    return f"{path}: trunk and bottleneck, frozen; decoder"


def _draw(discriminator: PatchGan, seed: int) -> str:
    def fill(name: str, tensor: Tensor) -> None:
        initialise_discriminator(name, tensor, seed)

    fill_parameters(discriminator.named_parameters(), fill)
    return f"drawn (seed={seed})"


def _learning(config: DecoderGan) -> Optim:
    """The discriminator's optimizer: the decoder's, but for what the discriminator has of its own."""
    own = config.discriminator
    changed = {"lr": own.lr, "betas": own.betas, "weight_decay": own.weight_decay, "clip_norm": own.clip_norm}
    return config.optim.model_copy(update=changed)


def _perceptual(config: DecoderGan, device: torch.device) -> LpipsDistance | None:
    rec = config.objectives.rec
    if not rec.perceptual:
        return None
    assert rec.lpips_weights is not None, "the schema asks for weights"
    return LpipsDistance.load(rec.lpips_weights).to(device)
