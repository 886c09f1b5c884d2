"""One training step, and nothing else.

    outputs = engine(batch)               teacher without gradient, the trunk once, text, heads, decoder
    losses  = compute(outputs, comm)      tensors only; under ZeRO-3 no parameter is there to be read
    engine.backward(total); engine.step() reduce-scatter, clip, AdamW on shards, gather
    teacher.follow(momentum)              local shards, no communication

With system.clip.micro_batches the batch goes through in parts; engine/grad_cache.py says how.
Nothing here waits for the device: numbers stay tensors until a report reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs import Config
from data.batch import Batch, to_device, wait_for_event
from engine.assemble import Assembly
from engine.grad_cache import GradientCache
from engine.optim import set_learning_rate
from engine.schedule import learning_rate, teacher_momentum, teacher_temperature
from engine.zero import one_reduction
from model.losses.total import TeacherCentres, compute_losses
from model.outputs import ClipOutputs, Outputs
from model.text import pack_captions


@dataclass(frozen=True)
class StepRecord:
    """What one step leaves behind on this rank."""

    losses: dict[str, Tensor]  # every named term, detached scalars on the device: this rank's mean
    schedule: dict[str, float]  # learning rate, teacher momentum and temperature of this step
    grad_norm: float | Tensor  # of the averaged gradient before clipping; the same on every rank
    counted: dict[str, float]  # caption_tokens_saved: share of token slots that packing left out; of the shared part
    outputs: Outputs
    centres: TeacherCentres | None  # for the next step


def train_step(parts: Assembly, batch: Batch, centres: TeacherCentres | None, config: Config) -> StepRecord:
    """Takes the optimizer step `batch.step` (counted from 0). A collective."""
    parts.phases.next_step()
    rate = learning_rate(batch.step, config)
    momentum = teacher_momentum(batch.step, config)
    temperature = teacher_temperature(batch.step, config)
    set_learning_rate(parts.engine, rate)

    kept_idx = None
    if parts.drop_path is not None:
        hidden = parts.corruptor.hidden(batch.step) if parts.corruptor is not None else 0
        kept_idx = to_device(parts.drop_path.draw(batch.step, hidden), parts.device)
    with one_reduction(parts.engine, num_backwards=config.system.clip.micro_batches):
        cache = GradientCache(batch, parts.engine.module.rows, lambda part: clip_features(parts, part))
        with parts.phases("inputs"):
            inputs = model_inputs(cache.shared, parts.device)
            corruption = to_device(parts.corruptor and parts.corruptor.draw(batch.step), parts.device)
        outputs = cache.complete(parts.engine(**inputs, kept_idx=kept_idx, rec_noise=corruption))
        parts.shares.watch(batch.step, outputs.branch_features)
        with parts.phases("objectives"):
            losses = compute_losses(
                outputs, config.objectives, temperature, parts.comm, centres, parts.perceptual, parts.frozen
            )
        parts.engine.backward(losses.total)
        cache.replay(parts.engine.backward)
    parts.engine.step()
    if parts.teacher is not None:
        parts.teacher.follow(momentum)
    if parts.average is not None:
        assert config.ema is not None, "assembled for it"
        with parts.phases("ema"):
            parts.average.follow(config.ema)
    return StepRecord(
        losses=losses.named(),
        schedule={"learning_rate": rate, "teacher_momentum": momentum, "teacher_temperature": temperature},
        grad_norm=parts.engine.get_global_grad_norm(),
        counted={"speed/caption_tokens_saved": inputs["captions"].saved_fraction(cache.shared.captions)},
        outputs=replace(outputs, branch_features={}),  # the next step needs their memory
        centres=losses.centres,
    )


def clip_features(parts: Assembly, part: Batch) -> ClipOutputs:
    """The forward of a micro-batch's clip rows alone."""
    with parts.phases("inputs"):
        inputs = model_inputs(part, parts.device)
    outputs: Outputs = parts.engine(**inputs, clip_only=True)
    assert outputs.clip is not None, "micro-batches are parts of the clip batch"
    parts.shares.watch(part.step, outputs.branch_features)
    return outputs.clip


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What Pretrainer.forward takes, on the device: captions packed, the rest as the batch has it."""
    names = ("images", "global_crops", "local_crops", "masks", "masked_idx")
    wait_for_event(batch.ready)
    tensors = {name: to_device(getattr(batch, name), device) for name in names}
    return {"captions": to_device(pack_captions(batch.captions), device), **tensors}
