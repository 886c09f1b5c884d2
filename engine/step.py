"""One training step of pre-training, and nothing else.

    outputs = engine(batch)               teacher without gradient, the trunk once, text, heads, decoder
    losses  = compute(outputs, comm)      tensors only; under ZeRO-3 no parameter is there to be read
    engine.backward(total); engine.step() reduce-scatter, clip, AdamW on shards, gather
    teacher.update(momentum)              local shards, no communication

With system.clip.micro_batches the clip batch goes through in parts (engine/grad_cache.py). `engine.step()` leaves
weights and moments as they are where the norm of the gradient is not finite or, with health.spike=skip, a spike: the
rule is parts.grad_norm_guard, put between ZeRO and the optimizer by engine/build.py. Nothing here waits for the device:
numbers stay tensors until a report reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from configs import Config
from data.batch import Batch, to_device, wait_for_event
from engine.build import PretrainParts
from engine.grad_cache import GradientCache
from engine.optim import set_learning_rate
from engine.schedule import learning_rate, teacher_momentum, teacher_temperature
from engine.tasks.task import StepResult
from engine.zero import reduce_once
from model.losses.total import TeacherCentres, compute_losses
from model.outputs import ClipOutputs, Outputs
from model.text import pack_captions

SAVED_TOKENS = "speed/caption_tokens_saved"  # fraction of token slots that packing left out, of the shared micro-batch


@dataclass(frozen=True)
class PretrainResult(StepResult):
    """What one step of pre-training leaves on this rank."""

    outputs: Outputs
    centres: TeacherCentres | None  # for the next step


def train_step(parts: PretrainParts, batch: Batch, centres: TeacherCentres | None, config: Config) -> PretrainResult:
    """Take the optimizer step `batch.step` (counted from 0). A collective."""
    parts.phases.next_step()
    rate = learning_rate(batch.step, config)
    momentum = teacher_momentum(batch.step, config)
    temperature = teacher_temperature(batch.step, config)
    set_learning_rate(parts.engine, rate)

    kept_idx = None
    if parts.drop_path is not None:
        num_hidden = parts.rec_noise.hidden(batch.step) if parts.rec_noise is not None else 0
        kept_idx = to_device(parts.drop_path.draw(batch.step, num_hidden), parts.device)
    with reduce_once(parts.engine, num_backwards=config.system.clip.micro_batches):
        cache = GradientCache.forward(batch, parts.engine.module.rows, lambda part: clip_features(parts, part))
        with parts.phases("inputs"):
            inputs = model_inputs(cache.shared, parts.device)
            corruption = to_device(parts.rec_noise and parts.rec_noise.draw(batch.step), parts.device)
        outputs = cache.complete(parts.engine(**inputs, kept_idx=kept_idx, rec_noise=corruption))
        parts.grad_fractions.watch(batch.step, outputs.branch_features)
        with parts.phases("objectives"):
            losses = compute_losses(
                outputs, config.objectives, temperature, parts.comm, centres, parts.perceptual, parts.frozen
            )
        parts.engine.backward(losses.total)
        cache.replay(parts.engine.backward)
    parts.engine.step()
    if parts.teacher is not None:
        parts.teacher.update(momentum)
    if parts.average is not None:
        assert config.ema is not None, "built for it"
        with parts.phases("ema"):
            parts.average.update(config.ema)
    return PretrainResult(
        losses=losses.named(),
        schedule={"learning_rate": rate, "teacher_momentum": momentum, "teacher_temperature": temperature},
        grad_norm=parts.engine.get_global_grad_norm(),
        counted={SAVED_TOKENS: inputs["captions"].saved_fraction(cache.shared.captions)},
        outputs=replace(outputs, branch_features={}),  # the next step needs their memory
        centres=losses.centres,
    )


def clip_features(parts: PretrainParts, part: Batch) -> ClipOutputs:
    """Run the clip rows of a micro-batch forward, and nothing else."""
    with parts.phases("inputs"):
        inputs = model_inputs(part, parts.device)
    outputs: Outputs = parts.engine(**inputs, clip_only=True)
    assert outputs.clip is not None, "micro-batches are parts of the clip batch"
    parts.grad_fractions.watch(part.step, outputs.branch_features)
    return outputs.clip


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the arguments of Pretrainer.forward, on the device: captions packed, the rest as the batch has it."""
    names = ("images", "global_crops", "local_crops", "masks", "masked_idx")
    wait_for_event(batch.ready)
    tensors = {name: to_device(getattr(batch, name), device) for name in names}
    return {"captions": to_device(pack_captions(batch.captions), device), **tensors}
