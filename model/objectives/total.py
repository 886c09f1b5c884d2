"""The sum: clip.weight * clip + ssl.weight * ssl + rec.weight * rec, every part under its name.

    losses = compute(outputs, config.objectives, teacher_temp=0.05, comm=Solo())
    losses.total.backward()
    losses.named()     # {"clip": 2.08, "clip_accuracy": 0.1, ..., "ssl": 13.7, ..., "total": 16.0}

What is computed on one rank is the mean over its rows; the mean over ranks is the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from configs.learning import Align, Clip, Objectives, Rec, Ssl
from kernels.prototypes import target_health
from model.frozen import Frozen
from model.objectives.align import cosine_loss, distance_loss
from model.objectives.comm import Comm
from model.objectives.contrastive import sigmoid_loss, softmax_loss
from model.objectives.koleo import koleo_loss
from model.objectives.masked_patch import masked_patch_loss
from model.objectives.perceptual import Perceptual
from model.objectives.pixels import l1_loss, l2_loss, to_signed
from model.objectives.self_distill import global_loss, local_loss
from model.objectives.targets import Targets, follow_centre, sinkhorn
from model.outputs import ClipOutputs, Outputs, RecOutputs, SslOutputs


@dataclass(frozen=True)
class Centres:
    """The running means that objectives.ssl.targets=centering subtracts, (K,) float32: state of a run."""

    cls_K: Tensor
    patch_K: Tensor

    @classmethod
    def zeros(cls, num_prototypes: int, device: torch.device | str = "cpu") -> Centres:
        """Before the first step: nothing is subtracted."""
        return cls(torch.zeros(num_prototypes, device=device), torch.zeros(num_prototypes, device=device))


@dataclass(frozen=True)
class Term:
    """One summand: value, unweighted, and its weight inside the objective."""

    name: str
    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """clip, ssl or rec: the weighted sum of its terms. `health` is looked at, never trained on."""

    name: str
    weight: float
    terms: tuple[Term, ...]
    health: dict[str, Tensor]

    @cached_property
    def value(self) -> Tensor:
        """Scalar: what the total weighs with `weight`."""
        return torch.stack([term.weight * term.value for term in self.terms]).sum()


@dataclass(frozen=True)
class Losses:
    """All of one step, on this rank."""

    objectives: tuple[Objective, ...]
    centres: Centres | None  # after this step's update; as they came with targets=sinkhorn

    @cached_property
    def total(self) -> Tensor:
        """Scalar: what is differentiated."""
        return torch.stack([objective.weight * objective.value for objective in self.objectives]).sum()

    def named(self) -> dict[str, Tensor]:
        """Detached scalars on the device (no host sync): terms unweighted, the sums as summed."""
        named: dict[str, Tensor] = {}
        for objective in self.objectives:
            named[objective.name] = objective.value.detach()
            named |= {term.name: term.value.detach() for term in objective.terms}
            named |= {name: value.detach() for name, value in objective.health.items()}
        return named | {"total": self.total.detach()}


def compute(
    outputs: Outputs,
    objectives: Objectives,
    teacher_temp: float,
    comm: Comm,
    centres: Centres | None = None,
    perceptual: Perceptual | None = None,
    frozen: Frozen | None = None,
) -> Losses:
    """Every objective with a weight, in float32 whatever autocast says.

    `centres` is needed with targets=centering, `perceptual` with rec.perceptual > 0, `frozen` with rec.align. An
    objective without weight is left out; for one with a weight the model must have given its outputs.
    """
    parts: list[Objective] = []
    with _without_autocast(outputs):
        if objectives.clip.weight:
            assert outputs.clip is not None, "clip has a weight but the model gave no clip outputs"
            parts.append(_clip(outputs.clip, objectives.clip, comm))
        if objectives.ssl.weight:
            assert outputs.ssl is not None, "ssl has a weight but the model gave no ssl outputs"
            cls, patch, centres = teacher_targets(outputs.ssl, objectives.ssl, teacher_temp, comm, centres)
            parts.append(_ssl(outputs.ssl, objectives.ssl, cls, patch, comm))
        if objectives.rec.weight:
            assert outputs.rec is not None, "rec has a weight but the model gave no rec outputs"
            parts.append(_rec(outputs.rec, objectives.rec, perceptual, frozen))
    return Losses(tuple(parts), centres)


def teacher_targets(
    ssl: SslOutputs, config: Ssl, temp: float, comm: Comm, centres: Centres | None
) -> tuple[Targets, Targets, Centres | None]:
    """Targets for the 2S CLS and for the M hidden patches, and the centres after this step."""
    cls_GE, patch_ME, teacher_KE = ssl.teacher_global_GE, ssl.teacher_patch_ME, ssl.teacher_KE
    if config.targets == "sinkhorn":
        cls_bias_K = sinkhorn(cls_GE, teacher_KE, temp, comm)
        patch_bias_K = sinkhorn(patch_ME, teacher_KE, temp, comm)
        followed = centres
    else:
        assert centres is not None, "targets=centering needs the centres of the step before, at first Centres.zeros(K)"
        cls_bias_K, patch_bias_K = centres.cls_K / temp, centres.patch_K / temp
        followed = Centres(
            follow_centre(centres.cls_K, cls_GE, teacher_KE, config.centre_momentum, comm),
            follow_centre(centres.patch_K, patch_ME, teacher_KE, config.centre_momentum, comm),
        )
    return Targets(cls_GE, teacher_KE, cls_bias_K, temp), Targets(patch_ME, teacher_KE, patch_bias_K, temp), followed


def _clip(clip: ClipOutputs, config: Clip, comm: Comm) -> Objective:
    health = {"logit_scale": clip.logit_scale.squeeze()}
    if config.kind == "softmax":
        contrast = softmax_loss(clip.image_BE, clip.text_BE, clip.logit_scale, comm)
    else:
        assert clip.logit_bias is not None, "the sigmoid loss needs a logit_bias"
        contrast = sigmoid_loss(clip.image_BE, clip.text_BE, clip.logit_scale, clip.logit_bias, comm)
        health["logit_bias"] = clip.logit_bias.squeeze()
    health["clip_accuracy"] = contrast.accuracy
    return Objective("clip", config.weight, (Term("clip", contrast.loss),), health)


def _ssl(ssl: SslOutputs, config: Ssl, cls: Targets, patch: Targets, comm: Comm) -> Objective:
    num_crops, temp, student_KE = len(ssl.student_global_GE), config.student_temp, ssl.student_KE
    num_locals = 2 * len(ssl.student_local_LE) // num_crops
    mim = masked_patch_loss(ssl.student_patch_ME, student_KE, patch, ssl.patch_weight_M, temp, num_crops)
    terms = [
        Term("dino_local", local_loss(ssl.student_local_LE, student_KE, cls, temp)),
        Term("dino_global", global_loss(ssl.student_global_GE, student_KE, cls, temp, num_locals)),
        Term("mim", mim),
    ]
    if config.koleo:
        terms.append(Term("koleo", koleo_loss(ssl.student_cls_GD, comm), config.koleo))
    # ln K: the teacher says nothing; 0: it has collapsed to one prototype or is very sure.
    entropy_R, share_K = target_health(cls.teacher_RE, cls.teacher_KE, cls.temp, cls.bias_K)
    health = {"teacher_entropy": entropy_R.mean(), "prototype_share": share_K.max()}
    return Objective("ssl", config.weight, tuple(terms), health)


def _rec(rec: RecOutputs, config: Rec, perceptual: Perceptual | None, frozen: Frozen | None) -> Objective:
    pixels = (("l1", l1_loss, config.l1), ("l2", l2_loss, config.l2))
    terms = [Term(name, loss(rec.recon, rec.target), weight) for name, loss, weight in pixels if weight]
    if config.perceptual:
        assert perceptual is not None, "rec.perceptual has a weight but no LPIPS network was given"
        distance_R = perceptual(to_signed(rec.recon), to_signed(rec.target))
        terms.append(Term("lpips", distance_R.sum() / len(distance_R), config.perceptual))
    # Of this rank's rows: a channel that says nothing, or explodes, does so on every rank.
    std_L = rec.latent.detach().float().transpose(0, 1).flatten(1).std(dim=1, correction=0)
    health = {"latent_std_min": std_L.min(), "latent_std_max": std_L.max()}
    if rec.posterior is not None:
        divergence_R, health["latent_std"] = rec.posterior.kl(), rec.posterior.std.mean()
        terms.append(Term("kl", divergence_R.sum() / len(divergence_R), config.kl))
    if config.align is not None:
        assert frozen is not None, "rec.align is set but no frozen encoder was given"
        terms.extend(_align(rec, config.align, frozen))
    return Objective("rec", config.weight, tuple(terms), health)


def _align(rec: RecOutputs, config: Align, frozen: Frozen) -> list[Term]:
    """With the weight alone: the adaptive ratio is of gradients and is known in backward only (balance.py)."""
    assert rec.align is not None, "rec.align is set but the model gave no latents to align"
    feature_RPW = frozen(rec.target, (rec.latent.shape[2], rec.latent.shape[3]))
    cosine = cosine_loss(rec.align.projected_RPW, feature_RPW, config.cosine_margin)
    distance = distance_loss(rec.align.latent_RPL, feature_RPW, config.distance_margin)
    return [Term("align_cosine", cosine, config.weight), Term("align_distance", distance, config.weight)]


def _without_autocast(outputs: Outputs) -> torch.autocast:
    present = (
        outputs.clip.image_BE if outputs.clip else None,
        outputs.ssl.student_global_GE if outputs.ssl else None,
        outputs.rec.recon if outputs.rec else None,
    )
    return torch.autocast(next(tensor.device.type for tensor in present if tensor is not None), enabled=False)
