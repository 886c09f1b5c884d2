"""One step of stage 2, and nothing else: the decoder's, then the discriminator's.

    recon = engine(images)                     encoder and bottleneck without gradient, decoder
    total = rec + weight * gan                 the discriminator judges; its own parameters get no gradient
    engine.backward, engine.step, average      the decoder moves, and its average follows
    logits = discriminator(real and recon)     the SAME reconstructions, made before the decoder moved
    discriminator.backward, .step

The discriminator steps from gan.discriminator_start on; the decoder listens to it from gan.start on, later or at once:
one that has seen nothing has nothing to say.

In the decoder's term the discriminator is called as `engine.module(x)`: a forward of the engine itself would want a
backward of its own. Measured with deepspeed 0.19.8: its parameters are gathered and let go by hooks on its layers all
the same, and on ZeRO 1, 2 and 3 the steps are those of plain PyTorch (tests/engine/trainings/test_decoder_gan.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs import DecoderGan
from data.batch import to_device, wait_for_event
from data.loader import ImageBatch
from engine.average import Average
from engine.health.judge import Judge
from engine.optim import set_learning_rate
from engine.schedule import learning_rate
from model.decoder import DecoderStageOutputs
from model.losses.comm import Comm
from model.losses.gan import decoder_losses, discriminator_loss
from model.losses.perceptual import LpipsDistance
from model.losses.pixels import to_signed
from profiling.instruments.phases import PhaseTimer

LISTENS, JUDGES = "gan/decoder_listens", "gan/discriminator_steps"  # reported: shares of the steps


@dataclass(frozen=True)
class DecoderAssembly:
    """Everything a step of stage 2 needs on this rank."""

    engine: Any  # DeepSpeed's, around model.decoder.DecoderStage
    discriminator: Any  # DeepSpeed's, around model.losses.gan.PatchGan
    average: Average  # of the decoder
    judges: tuple[Judge, Judge]  # of either engine's steps
    comm: Comm
    perceptual: LpipsDistance | None
    device: torch.device
    phases: PhaseTimer


@dataclass(frozen=True)
class DecoderRecord:
    """What one step leaves behind on this rank; see engine/training.py."""

    losses: dict[str, Tensor]  # of a term that is not there yet: 0
    schedule: dict[str, float]
    grad_norm: float | Tensor
    counted: dict[str, float]
    outputs: DecoderStageOutputs


def decoder_step(parts: DecoderAssembly, batch: ImageBatch, config: DecoderGan) -> DecoderRecord:
    """Takes the step `batch.step` (counted from 0). A collective."""
    parts.phases.next_step()
    listens, judges = (
        is_on(config.objectives.gan.start, batch.step, config),
        is_on(config.objectives.gan.discriminator_start, batch.step, config),
    )
    rate = learning_rate(batch.step, config)
    set_learning_rate(parts.engine, rate)
    with parts.phases("inputs"):
        wait_for_event(batch.ready)
        images = to_device(batch.images, parts.device)
    outputs: DecoderStageOutputs = parts.engine(images)
    with parts.phases("objectives"):
        judge = parts.discriminator.module if listens else None
        found = decoder_losses(outputs, config.objectives, parts.comm, parts.perceptual, judge)
    parts.engine.backward((outputs.recon * found.gradient).sum())  # whose gradient at the pixels is found.gradient
    parts.engine.step()
    parts.average.follow(config.ema)
    if judges:
        set_learning_rate(parts.discriminator, rate * config.discriminator.lr / config.optim.lr)
        learnt = _discriminator_step(parts, outputs, config)
    else:
        learnt = dict.fromkeys(("disc", "logits_real", "logits_fake"), images.new_zeros((), dtype=torch.float32))
    return DecoderRecord(
        losses=found.named | learnt,
        schedule={"learning_rate": rate},
        grad_norm=parts.engine.get_global_grad_norm(),
        counted={LISTENS: float(listens), JUDGES: float(judges)},
        outputs=outputs,
    )


def is_on(start: float, step: int, config: DecoderGan) -> bool:
    """Whether what begins at the share `start` of the run has begun at `step`."""
    return step >= round(start * config.optim.steps)


def _discriminator_step(parts: DecoderAssembly, outputs: DecoderStageOutputs, config: DecoderGan) -> dict[str, Tensor]:
    """Real and reconstructed pictures in one pass, which no norm of the network mixes."""
    with parts.phases("objectives"):
        pictures = torch.cat((to_signed(outputs.target), to_signed(outputs.recon.detach())))
        real, fake = parts.discriminator(pictures).chunk(2)
        loss = discriminator_loss(real, fake, config.objectives.gan.kind)
    parts.discriminator.backward(loss)
    parts.discriminator.step()
    return {"disc": loss.detach(), "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
