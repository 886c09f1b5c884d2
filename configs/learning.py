"""What is learnt from a step: the objectives and their weights, the optimizer, the teacher.

    Objectives(rec=Rec(perceptual=0)).rec.weight        # 0.1: L1 alone, at the paper's weight

*Science*: each of these changes results. Rules and tags as in configs/schema.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.architecture import Vit
from configs.section import (
    Betas,
    ClipNorm,
    Digest,
    Later,
    LearningRate,
    MaskRange,
    Momentum,
    NotBool,
    Number,
    Positive,
    Section,
    Share,
    SmallPositive,
    Temperature,
    Weight,
    WeightDecay,
)


class Clip(Section):
    """Images against captions (model/losses/clip.py): softmax is InfoNCE, sigmoid SigLIP's loss."""

    weight: Weight = 1.0
    kind: Literal["softmax", "sigmoid"] = "softmax"


class Ssl(Section):
    """ssl = DINO's pairs of views + iBOT's hidden patches + koleo * KoLeo. The teacher's own schedules: `Teacher`."""

    weight: Weight = 1.0
    koleo: Weight = 0.1  # [I]
    student_temp: Temperature = 0.1
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    centre_momentum: Momentum = 0.9  # with targets=centering


class Noise(Section):
    """Noise on the latents that the decoder learns from (l-DeTok, arXiv 2507.15856): x of an image, t ~ U(0, 1) drawn
    for it, e ~ N(0, scale^2) for each of its numbers. In training only."""

    kind: Literal["none", "interpolative", "additive"] = "none"  # (1 - t) x + t e; x + t e, which was worse there
    scale: Number = Field(3.0, gt=0, le=1e3)  # of l-DeTok

    @model_validator(mode="after")
    def _scale_of_something(self) -> Noise:
        if self.kind == "none" and self.scale != type(self).model_fields["scale"].default:
            raise ValueError(
                f"scale={self.scale:g} but kind=none: there is no noise to scale; set objectives.rec.noise.kind, or "
                "remove the scale"
            )
        return self


class Align(Section):
    """VA-VAE: the latents follow the features of a frozen encoder (arXiv 2501.01423, section 3.2).

    Defaults are those of the last stage of its published training; the first has weight 0.5 and no margins.
    """

    kind: Literal["trunk", "dinov2"] = "trunk"  # of a weights file of ours; or DINOv2, what VA-VAE aligned with [P]
    weights: str  # that file; DINOv2's as transformers or timm have it. Where it lies is not science
    sha256: str | None = None  # of the file's tensors; filled in at the start, and one that is given must be the file's
    encoder: Vit  # as the file describes it: the linear map onto its width is part of this run's model
    patch_size: SmallPositive = 16  # of the encoder; DINOv2's is 14
    registers: Annotated[int, Field(ge=0, le=1024), NotBool] = 0  # of the encoder
    weight: Number = Field(0.1, gt=0, le=1e6)  # beside l1 and perceptual
    cosine_margin: Share = 0.5  # m1: latent and feature need no cosine above 1 - m1
    distance_margin: Share = 0.25  # m2: a pair's two cosines may differ by so much
    adaptive: bool = True  # weight x the ratio of the gradients' norms at the encoder's last layer; False: weight alone

    @model_validator(mode="after")
    def _dinov2_has_blocks_of_its_own(self) -> Align:
        vit = self.encoder
        if self.kind == "dinov2" and vit != Vit(width=vit.width, depth=vit.depth, heads=vit.heads):
            raise ValueError(
                "kind=dinov2 with more in encoder than width, depth and heads: its blocks are DINOv2's, whatever else "
                "is said of them; remove the rest"
            )
        return self


def require_lpips_weights(perceptual: float, weights: str | None, sha256: str | None) -> None:
    """Raise ValueError where a perceptual term, or a digest, has no file with LPIPS weights."""
    if perceptual and weights is None:
        raise ValueError(
            f"perceptual={perceptual:g} but lpips_weights is not set: the perceptual term is never dropped silently; "
            "give objectives.rec.lpips_weights=FILE, or switch it off with objectives.rec.perceptual=0"
        )
    if sha256 and weights is None:
        raise ValueError(
            f"lpips_sha256={sha256} of no file: give objectives.rec.lpips_weights too, or remove "
            "objectives.rec.lpips_sha256"
        )


class Rec(Section):
    """rec = l1 * L1 + l2 * mean square + perceptual * LPIPS + kl * KL, and with `align` its two terms.

    `noise` changes the latents that the decoder reads, `mask` hides patches from the encoder: both in training only.
    """

    weight: Weight = 0.1  # [P]
    l1: Weight = 1.0
    l2: Weight = 0.0  # mean square; l-DeTok's 1, with l1 at 0
    perceptual: Weight = 1.0  # L1 : LPIPS = 1 : 1 [P]; needs lpips_weights
    lpips_weights: str | None = None  # safetensors with VGG-16 features and LPIPS heads
    # sha256 of its tensors: filled in at the start; a given one is compared with the file
    lpips_sha256: Annotated[Digest | None, Later()] = None
    kl: Weight = 0.0  # nats of an image, with model.latent=gaussian; l-DeTok's 1e-6
    noise: Noise = Noise()
    mask: MaskRange | None = None  # share of patches hidden from the encoder, U(low, high); l-DeTok's -0.1, 0.7
    align: Align | None = None  # no part of VTP: the baseline it is compared with

    @model_validator(mode="after")
    def _perceptual_is_explicit(self) -> Rec:
        require_lpips_weights(self.perceptual if self.weight else 0.0, self.lpips_weights, self.lpips_sha256)
        return self

    @model_validator(mode="after")
    def _something_is_compared(self) -> Rec:
        if self.weight and not (self.l1 or self.l2 or self.perceptual):
            raise ValueError(
                f"weight={self.weight:g} but l1, l2 and perceptual are 0: the reconstruction is compared with nothing; "
                "set one of objectives.rec.l1, l2, perceptual"
            )
        return self

    @model_validator(mode="after")
    def _alignment_is_of_a_reconstruction(self) -> Rec:
        if self.align is not None and not self.weight:
            raise ValueError(
                "align is set but weight=0: the latents that are aligned are those of the reconstruction; give "
                "objectives.rec.weight, or remove objectives.rec.align"
            )
        if self.align is not None and self.mask is not None:
            raise ValueError(
                f"align is set and mask={list(self.mask)}: the frozen encoder sees whole images, latents of patches "
                "that the trunk never saw cannot follow; remove objectives.rec.mask or objectives.rec.align"
            )
        return self

    @model_validator(mode="after")
    def _without_rec_nothing_is_disturbed(self) -> Rec:
        asked = {"noise.kind": self.noise.kind != "none", "mask": self.mask is not None, "kl": self.kl > 0}
        for key in (key for key, is_asked in asked.items() if is_asked and not self.weight):
            raise ValueError(
                f"{key} is set but weight=0: it changes what rec learns from; set objectives.rec.weight and batch.rec, "
                f"or remove objectives.rec.{key}"
            )
        return self


class Objectives(Section):
    """total = clip.weight * clip + ssl.weight * ssl + rec.weight * rec, the paper's joint objective."""

    clip: Clip = Clip()
    ssl: Ssl = Ssl()
    rec: Rec  # no default: the perceptual term wants a decision


class Optim(Section):
    """AdamW with linear warm-up and cosine decay [D of OpenCLIP]."""

    kind: Literal["adamw", "lamb"] = "adamw"  # LAMB: a trust ratio per matrix, and per rank's share of it
    steps: Positive
    lr: LearningRate = 5e-4  # peak, at lr_batch images a step; scaled by sqrt(samples a step / lr_batch)
    lr_batch: Positive = 16_384
    final_lr: Share = 0.0  # as a share of the peak
    warmup: Share = 0.03  # as a share of steps
    betas: Betas = (0.9, 0.98)
    eps: Number = Field(1e-6, ge=1e-16, le=1)  # below, float32 divides 0 by 0
    weight_decay: WeightDecay = 0.1  # none on vectors
    clip_norm: ClipNorm = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"


class Teacher(Section):
    """How slowly the teacher follows and how sharp its targets are: schedules over optim.steps (engine/schedule.py)."""

    momentum: Share = 0.994
    final_momentum: Share = 1.0  # reached by a cosine; equal to momentum for a fixed one
    temp: Temperature = 0.04
    final_temp: Temperature = 0.07
    temp_warmup: Share = 0.3  # share of steps from temp to final_temp
