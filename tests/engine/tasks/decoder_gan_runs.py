"""Stage 2 at a size for tests: a config, the engine's run on random pictures, and the same run in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import DecoderGan
from configs.deepspeed import load_ds_config
from configs.load import validate
from data.loader import ImageBatch
from engine import zero
from engine.optim import parameter_groups
from engine.schedule import learning_rate
from engine.tasks.decoder_gan import DecoderGanParts, DecoderGanTask, build_decoder_gan, has_begun
from engine.tasks.frozen_tokenizer import described_tokenizer, with_tokenizer_digests
from model.decoder import DecoderStage
from model.losses.comm import Comm, Solo
from model.losses.gan import PatchGan, discriminator_loss, generator_loss, initialise_discriminator
from model.losses.pixels import l1_loss, to_signed
from model.weights import read_weights
from tests.engine.ranks import DEEPSPEED

STEPS = 6


def stage_config(weights: Path, **sections: Any) -> DecoderGan:
    """Six steps: from the third on the discriminator steps, from the fourth on the decoder listens."""
    tree: dict[str, Any] = {
        "name": "stage2",
        "kind": "decoder_gan",
        "tokenizer": {"weights": str(weights)},
        "data": {"train": ["unused.tar"], "streams": 4},
        "batch": {"images": 4},
        "views": {"image_size": 32},
        "objectives": {
            "rec": {"perceptual": 0},
            "gan": {"discriminator_start": 0.33, "start": 0.5},
        },
        "discriminator": {"width": 8, "layers": 2, "lr": 3e-3},
        "optim": {"steps": STEPS, "lr": 3e-3, "lr_batch": 4, "warmup": 0.0, "precision": "fp32"},
        "ema": 0.5,
    }
    return with_tokenizer_digests(validate(_merged(tree, sections), "test", DecoderGan))


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with some values changed, section by section."""
    changed = {
        key: _merged(tree.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    }
    return tree | changed


def pictures(config: DecoderGan, step: int, comm: Comm) -> ImageBatch:
    """This rank's rows of a global batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    size = (config.batch.images, 3, config.views.image_size, config.views.image_size)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return ImageBatch(images[comm.rank :: comm.world_size], step, ())


@dataclass(frozen=True)
class Tuned:
    """What is compared between two ways of training."""

    losses: list[dict[str, float]]  # of every step, mean over ranks
    weights: dict[str, Tensor]  # whole, of the stage: frozen and trained
    discriminator: dict[str, Tensor]


def build(config: DecoderGan, comm: Comm, stage: str) -> DecoderGanTask:
    ds_config = load_ds_config(DEEPSPEED / f"{stage}.json", config, comm.world_size)
    if stage == "zero3":
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else all of it would stay gathered
    model = described_tokenizer(config)
    parts, choices = build_decoder_gan(config, model, ds_config, comm)
    no_loader: Any = None
    return DecoderGanTask(config, model, parts, choices, no_loader)


def run_steps(training: DecoderGanTask, comm: Comm, first: int, last: int) -> list[dict[str, float]]:
    losses = []
    for step in range(first, last):
        record = training.step(pictures(training.config, step, comm))
        means = {name: float(comm.all_sum(value)) / comm.world_size for name, value in record.losses.items()}
        losses.append(means)
    return losses


def outcome(parts: DecoderGanParts, losses: list[dict[str, float]]) -> Tuned:
    return Tuned(losses, _whole(parts.engine), _whole(parts.discriminator))


def _whole(engine: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with zero.gathered([parameter]):
            found[name] = parameter.detach().float().clone()
    return found


def train_plainly(config: DecoderGan) -> tuple[Tuned, dict[str, Tensor]]:
    """The same run without DeepSpeed, every loss through plain autograd down to the last layer's weight; and the
    averaged decoder."""
    state, model = read_weights(Path(config.tokenizer.weights))
    stage, judge = DecoderStage(model, "matmul"), PatchGan(config.discriminator)
    stage.load_state_dict({name: state[name] for name in stage.state_dict()})
    for name, parameter in judge.named_parameters():
        initialise_discriminator(name, parameter, config.seed)
    own, gan = config.discriminator, config.objectives.gan
    decoding = torch.optim.AdamW(parameter_groups(stage, config.optim.weight_decay), betas=config.optim.betas, eps=1e-6)
    judging = torch.optim.AdamW(parameter_groups(judge, own.weight_decay), betas=own.betas, eps=1e-6)
    average = {name: p.detach().clone() for name, p in stage.decoder.named_parameters(prefix="decoder")}
    losses = []
    for step in range(config.optim.steps):
        rate = learning_rate(step, config)
        outputs = stage(pictures(config, step, Solo()).images)
        rec, last = l1_loss(outputs.recon, outputs.target), stage.decoder.proj_out.weight
        term = weight = torch.zeros(())
        if has_begun(gan.start, step, config):
            term = generator_loss(judge(to_signed(outputs.recon)), gan.kind)
            norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec, term)]
            ratio = norms[0] / (norms[1] + 1e-4) if gan.balance == "adaptive" else 1.0
            weight = gan.weight * torch.as_tensor(ratio)
        total = rec + weight.detach() * term
        _take(decoding, total, stage, rate, config.optim.clip_norm)
        for name, parameter in stage.decoder.named_parameters(prefix="decoder"):
            average[name].lerp_(parameter.detach(), 1 - config.ema)
        disc = torch.zeros(())
        if has_begun(gan.discriminator_start, step, config):
            both = torch.cat((to_signed(outputs.target), to_signed(outputs.recon.detach())))
            disc = discriminator_loss(*judge(both).chunk(2), gan.kind)
            _take(judging, disc, judge, rate * own.lr / config.optim.lr, own.clip_norm)
        named = {"total": total, "rec": rec, "gan": term, "gan_weight": weight, "disc": disc}
        losses.append({name: value.item() for name, value in named.items()})
    return Tuned(losses, dict(stage.state_dict()), dict(judge.state_dict())), average


def _take(optimizer: torch.optim.Optimizer, loss: Tensor, model: torch.nn.Module, rate: float, norm: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], norm)
    optimizer.step()
