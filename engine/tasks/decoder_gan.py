"""Stage 2 as a TrainingTask: the decoder of a finished tokenizer against a discriminator.

    task = build_decoder_gan_task(config, ds_config, comm, run_dir, is_resumed=False)
    result = task.step(next(task.data.batches(first_step=0)))

One step (`decoder_step`) is the decoder's, then the discriminator's:

    recon = engine(images)                     encoder and bottleneck without gradient, decoder
    total = rec + weight * gan                 the discriminator scores recon; its own parameters get no gradient
    engine.backward, engine.step, average      the decoder moves, and its average follows
    logits = discriminator(real and recon)     the SAME reconstructions, made before the decoder moved
    discriminator.backward, .step

The discriminator trains from gan.discriminator_start on; the decoder has its GAN term from gan.start on, later or at
once: an untrained discriminator has nothing to teach.

Two DeepSpeed engines of one ZeRO stage: encoder, bottleneck and decoder in the first, of which the decoder alone is
trained, the discriminator in the second. The frozen weights come from the tokenizer's file at every start, resumed or
not; checkpoints hold what moves: the decoder, its average, the discriminator, both optimizers.

In the decoder's GAN term the discriminator is called as `engine.module(x)`: a forward of the engine itself would want a
backward of its own. Measured with deepspeed 0.19.8: its parameters are gathered and released by hooks on its layers all
the same, and on ZeRO 1, 2 and 3 the steps are those of plain PyTorch (tests/engine/tasks/test_decoder_gan.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import DecoderGan
from configs.model import Model
from configs.run import Optim
from data.batch import to_device, wait_for_event
from data.loader import ImageBatch, ImageLoader
from engine import distributed
from engine.build import build_engine, fill_parameters, time_phases
from engine.checkpoint.contents import TrainState
from engine.checkpoint.tensor_ranges import MAIN
from engine.ema import WeightEma
from engine.health.anomalies import GradNormGuard
from engine.optim import set_learning_rate
from engine.reporting.images import reconstructions
from engine.reporting.phase_timing import TimedComm
from engine.schedule import learning_rate
from engine.tasks.frozen_tokenizer import described_tokenizer, initial_decoder
from engine.tasks.shards import ShardData
from engine.tasks.task import StepResult, TaskSetup
from model.block import Block
from model.decoder import DecoderStage, DecoderStageOutputs
from model.describe import describe_decoder_gan
from model.imagenet import denormalise
from model.losses.comm import Comm
from model.losses.gan import PatchGan, decoder_losses, discriminator_loss, initialise_discriminator
from model.losses.perceptual import LpipsDistance
from model.losses.pixels import to_signed
from model.tokenizer import decode_pixels
from model.weights import open_weights
from profiling.cost.flops import StepFlops
from profiling.cost.step_flops import decoder_gan_flops
from profiling.instruments.phases import PhaseTimer

DISCRIMINATOR = "discriminator"  # name of its engine in a checkpoint
# Scalars: fractions of the steps in which the decoder had its GAN term, and in which the discriminator trained.
GAN_TERM_ON, DISCRIMINATOR_ON = "gan/decoder_listens", "gan/discriminator_steps"
NUM_SHOWN = 8  # images


@dataclass(frozen=True)
class DecoderGanParts:
    """Everything a step of stage 2 needs on this rank."""

    engine: Any  # DeepSpeed's, around model.decoder.DecoderStage
    discriminator: Any  # DeepSpeed's, around model.losses.gan.PatchGan
    average: WeightEma  # of the decoder
    guards: tuple[GradNormGuard, GradNormGuard]  # of the decoder's steps, and of the discriminator's
    comm: Comm
    perceptual: LpipsDistance | None
    device: torch.device
    phases: PhaseTimer


@dataclass(frozen=True)
class DecoderGanResult(StepResult):
    """What one step of stage 2 leaves on this rank; a term that is not on yet is 0."""

    outputs: DecoderStageOutputs


class DecoderGanTask:
    """Training of the decoder and its discriminator (engine/tasks/task.py, TrainingTask)."""

    def __init__(
        self,
        config: DecoderGan,
        model: Model,
        parts: DecoderGanParts,
        choices: dict[str, str],
        loader: ImageLoader,
    ) -> None:
        self.config, self.model, self.parts, self.data = config, model, parts, ShardData[ImageBatch](loader)
        attention: str = parts.engine.module.decoder.blocks[0].attn.backend
        self.setup = TaskSetup(config, parts.comm, parts.device, parts.phases, choices, attention, parts.guards)
        self._last_outputs: DecoderStageOutputs | None = None  # of the last step, for images

    def describe(self) -> str:
        """Describe the corpus, and the model as the table of model/describe.py."""
        return f"{self.data.describe()}\n{describe_decoder_gan(self.config, self.model)}"

    def step(self, batch: ImageBatch) -> DecoderGanResult:
        """Take one step of the decoder and, once it is on, of the discriminator."""
        result = decoder_step(self.parts, batch, self.config)
        self._last_outputs = result.outputs
        return result

    def flops(self, counted: Mapping[str, float]) -> StepFlops:
        """FLOPs of a step, with the fractions of the steps in which the discriminator took part."""
        took_part = counted.get(GAN_TERM_ON, 0.0), counted.get(DISCRIMINATOR_ON, 0.0)
        world_size = self.setup.comm.world_size
        return decoder_gan_flops(self.config, self.model, world_size, *took_part, backend=self.setup.attention)

    def metrics(self) -> dict[str, float]:
        """Return no metrics beside the losses."""
        return {}

    def images(self) -> dict[str, Tensor]:
        """Three rows: originals, reconstructions by stage 1's decoder, reconstructions of the last step."""
        if self._last_outputs is None:
            return {}
        outputs = self._last_outputs
        target, recon, latent = (x.detach()[:NUM_SHOWN] for x in (outputs.target, outputs.recon, outputs.latent))
        before = decode_pixels(initial_decoder(self.config, self.model).to(self.setup.device), latent.float())
        return {"reconstructions": reconstructions(denormalise(target), before, denormalise(recon))}

    def train_state(self) -> TrainState:
        """Return both engines, the decoder's average and both windows of gradient norms."""
        engines = {MAIN: self.parts.engine, DISCRIMINATOR: self.parts.discriminator}
        return TrainState(engines, (self.parts.average, *self.parts.guards))


def decoder_step(parts: DecoderGanParts, batch: ImageBatch, config: DecoderGan) -> DecoderGanResult:
    """Take the step `batch.step` (counted from 0). A collective."""
    parts.phases.next_step()
    has_gan_term = has_begun(config.objectives.gan.start, batch.step, config)
    trains_discriminator = has_begun(config.objectives.gan.discriminator_start, batch.step, config)
    rate = learning_rate(batch.step, config)
    set_learning_rate(parts.engine, rate)
    with parts.phases("inputs"):
        wait_for_event(batch.ready)
        images = to_device(batch.images, parts.device)
    outputs: DecoderStageOutputs = parts.engine(images)
    with parts.phases("objectives"):
        discriminator = parts.discriminator.module if has_gan_term else None
        losses = decoder_losses(outputs, config.objectives, parts.comm, parts.perceptual, discriminator)
    parts.engine.backward((outputs.recon * losses.gradient).sum())  # its gradient at the pixels is losses.gradient
    parts.engine.step()
    parts.average.update(config.ema)
    if trains_discriminator:
        set_learning_rate(parts.discriminator, rate * config.discriminator.lr / config.optim.lr)
        terms = _discriminator_step(parts, outputs, config)
    else:
        terms = dict.fromkeys(("disc", "logits_real", "logits_fake"), images.new_zeros((), dtype=torch.float32))
    return DecoderGanResult(
        losses=losses.named | terms,
        schedule={"learning_rate": rate},
        grad_norm=parts.engine.get_global_grad_norm(),
        counted={GAN_TERM_ON: float(has_gan_term), DISCRIMINATOR_ON: float(trains_discriminator)},
        outputs=outputs,
    )


def has_begun(start: float, step: int, config: DecoderGan) -> bool:
    """Whether what begins at the fraction `start` of the run has begun at `step`."""
    return step >= round(start * config.optim.steps)


def _discriminator_step(parts: DecoderGanParts, outputs: DecoderStageOutputs, config: DecoderGan) -> dict[str, Tensor]:
    """Train on real and reconstructed images in one pass; no norm layer of the network mixes images."""
    with parts.phases("objectives"):
        images = torch.cat((to_signed(outputs.target), to_signed(outputs.recon.detach())))
        real, fake = parts.discriminator(images).chunk(2)
        loss = discriminator_loss(real, fake, config.objectives.gan.kind)
    parts.discriminator.backward(loss)
    parts.discriminator.step()
    return {"disc": loss.detach(), "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


def build_decoder_gan_task(
    config: DecoderGan, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool
) -> DecoderGanTask:
    """Build the task on this rank, with the decoder of the tokenizer's file. A collective.

    With `is_resumed` the caller loads a checkpoint next.
    """
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
        gather_objects=distributed.gather_objects,
    )
    try:
        model = described_tokenizer(config)
        parts, choices = build_decoder_gan(config, model, ds_config, comm)
        return DecoderGanTask(config, model, parts, choices, loader)
    except BaseException:
        loader.close()
        raise


def build_decoder_gan(
    config: DecoderGan, model: Model, ds_config: dict[str, Any], comm: Comm
) -> tuple[DecoderGanParts, dict[str, str]]:
    """Build the two engines and what a step needs beside them; return the resolved choices too. A collective."""
    device = distributed.device()
    stage = build_engine(
        config,
        ds_config,
        device,
        make_model=lambda attention: DecoderStage(model, attention),
        initialise=lambda built: _fill_from_file(built, config),
        block_classes=(Block,),
    )
    critic = build_engine(
        config,
        ds_config | {"gradient_clipping": config.discriminator.clip_norm},
        device,
        make_model=lambda attention: PatchGan(config.discriminator),
        initialise=lambda built: _draw_discriminator(built, config.seed),
        block_classes=(),
        optim_settings=_discriminator_optim(config),
        name=DISCRIMINATOR,
    )
    average = WeightEma(stage.engine, MAIN)
    calls = {
        "decoder": (stage.engine.module.decoder, "tokens"),
        "ema": (average, "update"),
        "backward": (critic.engine, "backward"),
        "optimizer": (critic.engine, "step"),
    }
    phases = time_phases(config, device, stage.engine, {"trunk": "trunk"}, calls)
    parts = DecoderGanParts(
        engine=stage.engine,
        discriminator=critic.engine,
        average=average,
        guards=(stage.guard, critic.guard),
        comm=TimedComm(comm, phases),
        perceptual=_perceptual(config, device),
        device=device,
        phases=phases,
    )
    return parts, stage.choices | {"discriminator": critic.choices["weights"]}


def _fill_from_file(stage: DecoderStage, config: DecoderGan) -> str:
    """Load encoder and decoder from the tokenizer's file; return a summary."""
    path = Path(config.tokenizer.weights)
    with open_weights(path) as stored:

        def fill(name: str, tensor: Tensor) -> None:
            tensor.copy_(stored.get_tensor(name))

        fill_parameters(stage.named_parameters(), fill)
    return f"{path}: trunk and bottleneck, frozen; decoder"


def _draw_discriminator(discriminator: PatchGan, seed: int) -> str:
    """Draw the discriminator's first weights; return a summary."""

    def fill(name: str, tensor: Tensor) -> None:
        initialise_discriminator(name, tensor, seed)

    fill_parameters(discriminator.named_parameters(), fill)
    return f"drawn (seed={seed})"


def _discriminator_optim(config: DecoderGan) -> Optim:
    """Return the discriminator's optimizer settings: the decoder's, but for those of its own section."""
    own = config.discriminator
    changed = {"lr": own.lr, "betas": own.betas, "weight_decay": own.weight_decay, "clip_norm": own.clip_norm}
    return config.optim.model_copy(update=changed)


def _perceptual(config: DecoderGan, device: torch.device) -> LpipsDistance | None:
    rec = config.objectives.rec
    if not rec.perceptual:
        return None
    assert rec.lpips_weights is not None, "the schema asks for weights"
    return LpipsDistance.load(rec.lpips_weights).to(device)
