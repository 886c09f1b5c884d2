"""The total loss: clip.weight * clip + ssl.weight * ssl + rec.weight * rec, with every term by name.

    losses = compute_losses(outputs, config.objectives, teacher_temp=0.05, comm=Solo())
    losses.total.backward()
    losses.named()     # {"clip": 2.08, "clip_accuracy": 0.1, ..., "ssl": 13.7, ..., "total": 16.0}

A rank computes the mean over its rows; the mean over ranks is the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from configs.schema import AlignmentConfig, Clip, Objectives, Rec, Ssl
from kernels.prototypes import target_entropy_and_mean
from model.frozen import FrozenNetwork
from model.losses.alignment import alignment_cosine_loss, alignment_distance_loss
from model.losses.clip import sigmoid_clip_loss, softmax_clip_loss
from model.losses.comm import Comm
from model.losses.dino import dino_global_loss, dino_local_loss
from model.losses.ibot import ibot_loss
from model.losses.koleo import koleo_loss
from model.losses.perceptual import LpipsDistance
from model.losses.pixels import l1_loss, l2_loss, to_signed
from model.losses.targets import Targets, sinkhorn, update_centre
from model.outputs import ClipOutputs, Outputs, RecOutputs, SslOutputs


@dataclass(frozen=True)
class TeacherCentres:
    """Running means of teacher logits for objectives.ssl.targets=centering, (K,) float32; part of a run's state."""

    cls_K: Tensor
    patch_K: Tensor

    @classmethod
    def zeros(cls, num_prototypes: int, device: torch.device | str = "cpu") -> TeacherCentres:
        """The centres before the first step: zeros."""
        return cls(torch.zeros(num_prototypes, device=device), torch.zeros(num_prototypes, device=device))


@dataclass(frozen=True)
class LossTerm:
    """One term: its unweighted value and its weight inside the objective."""

    name: str
    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class ObjectiveLoss:
    """Loss of one objective (clip, ssl or rec): the weighted sum of its terms. `diagnostics` are only reported."""

    name: str
    weight: float
    terms: tuple[LossTerm, ...]
    diagnostics: dict[str, Tensor]

    @cached_property
    def value(self) -> Tensor:
        """Scalar: the sum of the terms, before `weight`."""
        return torch.stack([term.weight * term.value for term in self.terms]).sum()


@dataclass(frozen=True)
class StepLosses:
    """All losses of one step on this rank."""

    objectives: tuple[ObjectiveLoss, ...]
    centres: TeacherCentres | None  # after this step's update; unchanged with targets=sinkhorn

    @cached_property
    def total(self) -> Tensor:
        """Scalar: the loss to differentiate."""
        return torch.stack([objective.weight * objective.value for objective in self.objectives]).sum()

    def named(self) -> dict[str, Tensor]:
        """All values by name, detached scalars on the device (no host sync): terms unweighted, objectives summed."""
        named: dict[str, Tensor] = {}
        for objective in self.objectives:
            named[objective.name] = objective.value.detach()
            named |= {term.name: term.value.detach() for term in objective.terms}
            named |= {name: value.detach() for name, value in objective.diagnostics.items()}
        return named | {"total": self.total.detach()}


def compute_losses(
    outputs: Outputs,
    objectives: Objectives,
    teacher_temp: float,
    comm: Comm,
    centres: TeacherCentres | None = None,
    perceptual: LpipsDistance | None = None,
    frozen: FrozenNetwork | None = None,
) -> StepLosses:
    """Compute every objective that has a weight, in float32, also under autocast.

    `centres` is needed with targets=centering, `perceptual` with rec.perceptual > 0, `frozen` with rec.align. An
    objective without weight is left out; one with a weight must be in `outputs`.
    """
    parts: list[ObjectiveLoss] = []
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
    return StepLosses(tuple(parts), centres)


def teacher_targets(
    ssl: SslOutputs, config: Ssl, temp: float, comm: Comm, centres: TeacherCentres | None
) -> tuple[Targets, Targets, TeacherCentres | None]:
    """Compute targets for the 2S CLS and for the M hidden patches; return them and the centres after this step."""
    cls_GE, patch_ME, teacher_KE = ssl.teacher_global_GE, ssl.teacher_patch_ME, ssl.teacher_KE
    if config.targets == "sinkhorn":
        cls_bias_K = sinkhorn(cls_GE, teacher_KE, temp, comm)
        patch_bias_K = sinkhorn(patch_ME, teacher_KE, temp, comm)
        new_centres = centres
    else:
        assert centres is not None, "targets=centering needs the centres of the step before, at first Centres.zeros(K)"
        cls_bias_K, patch_bias_K = centres.cls_K / temp, centres.patch_K / temp
        new_centres = TeacherCentres(
            update_centre(centres.cls_K, cls_GE, teacher_KE, config.centre_momentum, comm),
            update_centre(centres.patch_K, patch_ME, teacher_KE, config.centre_momentum, comm),
        )
    return Targets(cls_GE, teacher_KE, cls_bias_K, temp), Targets(patch_ME, teacher_KE, patch_bias_K, temp), new_centres


def _clip(clip: ClipOutputs, config: Clip, comm: Comm) -> ObjectiveLoss:
    diagnostics = {"logit_scale": clip.logit_scale.squeeze()}
    if config.kind == "softmax":
        contrast = softmax_clip_loss(clip.image_BE, clip.text_BE, clip.logit_scale, comm)
    else:
        assert clip.logit_bias is not None, "the sigmoid loss needs a logit_bias"
        contrast = sigmoid_clip_loss(clip.image_BE, clip.text_BE, clip.logit_scale, clip.logit_bias, comm)
        diagnostics["logit_bias"] = clip.logit_bias.squeeze()
    diagnostics["clip_accuracy"] = contrast.accuracy
    return ObjectiveLoss("clip", config.weight, (LossTerm("clip", contrast.loss),), diagnostics)


def _ssl(ssl: SslOutputs, config: Ssl, cls: Targets, patch: Targets, comm: Comm) -> ObjectiveLoss:
    num_crops, temp, student_KE = len(ssl.student_global_GE), config.student_temp, ssl.student_KE
    num_locals = 2 * len(ssl.student_local_LE) // num_crops
    mim = ibot_loss(ssl.student_patch_ME, student_KE, patch, ssl.patch_weight_M, temp, num_crops)
    terms = [
        LossTerm("dino_local", dino_local_loss(ssl.student_local_LE, student_KE, cls, temp)),
        LossTerm("dino_global", dino_global_loss(ssl.student_global_GE, student_KE, cls, temp, num_locals)),
        LossTerm("mim", mim),
    ]
    if config.koleo:
        terms.append(LossTerm("koleo", koleo_loss(ssl.student_cls_GD, comm), config.koleo))
    # ln K: a uniform teacher; 0: it has collapsed to one prototype or is very sure.
    entropy_R, share_K = target_entropy_and_mean(cls.teacher_RE, cls.teacher_KE, cls.temp, cls.bias_K)
    diagnostics = {"teacher_entropy": entropy_R.mean(), "prototype_share": share_K.max()}
    return ObjectiveLoss("ssl", config.weight, tuple(terms), diagnostics)


def _rec(rec: RecOutputs, config: Rec, perceptual: LpipsDistance | None, frozen: FrozenNetwork | None) -> ObjectiveLoss:
    pixels = (("l1", l1_loss, config.l1), ("l2", l2_loss, config.l2))
    terms = [LossTerm(name, loss(rec.recon, rec.target), weight) for name, loss, weight in pixels if weight]
    if config.perceptual:
        assert perceptual is not None, "rec.perceptual has a weight but no LPIPS network was given"
        distance_R = perceptual(to_signed(rec.recon), to_signed(rec.target))
        terms.append(LossTerm("lpips", distance_R.sum() / len(distance_R), config.perceptual))
    # Of this rank's rows only: a channel that is constant, or explodes, is so on every rank.
    std_L = rec.latent.detach().float().transpose(0, 1).flatten(1).std(dim=1, correction=0)
    diagnostics = {"latent_std_min": std_L.min(), "latent_std_max": std_L.max()}
    if rec.posterior is not None:
        divergence_R, diagnostics["latent_std"] = rec.posterior.kl(), rec.posterior.std.mean()
        terms.append(LossTerm("kl", divergence_R.sum() / len(divergence_R), config.kl))
    if config.align is not None:
        assert frozen is not None, "rec.align is set but no frozen encoder was given"
        terms.extend(_align(rec, config.align, frozen))
    return ObjectiveLoss("rec", config.weight, tuple(terms), diagnostics)


def _align(rec: RecOutputs, config: AlignmentConfig, frozen: FrozenNetwork) -> list[LossTerm]:
    """Alignment terms with their fixed weight: the adaptive ratio is computed in backward (balance_gradients)."""
    assert rec.align is not None, "rec.align is set but the model gave no latents to align"
    feature_RPW = frozen(rec.target, (rec.latent.shape[2], rec.latent.shape[3]))
    cosine = alignment_cosine_loss(rec.align.projected_RPW, feature_RPW, config.cosine_margin)
    distance = alignment_distance_loss(rec.align.latent_RPL, feature_RPW, config.distance_margin)
    return [LossTerm("align_cosine", cosine, config.weight), LossTerm("align_distance", distance, config.weight)]


def _without_autocast(outputs: Outputs) -> torch.autocast:
    present = (
        outputs.clip.image_BE if outputs.clip else None,
        outputs.ssl.student_global_GE if outputs.ssl else None,
        outputs.rec.recon if outputs.rec else None,
    )
    return torch.autocast(next(tensor.device.type for tensor in present if tensor is not None), enabled=False)
