"""Pre-training: objectives, teacher, initial weights, and `Config`, which puts all sections together.

    load_config("configs/demo.yaml").batch.clip        # 64 images a step, over all ranks
    Objectives(rec=Rec(perceptual=0)).rec.weight       # 0.1: L1 alone, at the paper's weight

*Science* (`seed`, `data`, `batch`, `views`, `masks`, `model`, `init`, `objectives`, `optim`, `teacher`, `ema`,
`health`) changes results and is fingerprinted; *system* (`system`, `profile`) must not change them. All batch sizes
are global: a rank's batch is a division by the world size, so a preset means the same run on 2 CPU ranks and on 256
GPUs.

Every default stands once, beside its setting, with the rules of its section: inputs in configs/data.py, networks in
configs/model.py, optimizer and system in configs/run.py. Rules between sections are methods of `Config`.

Tags beside defaults, as in docs/recipe.md: [P] paper, [C] official inference code, [A] author, [I] inferred,
[D] chosen.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from configs.data import BatchSizes, ImageTextData, Masks, Views
from configs.model import Model, Vit
from configs.run import RunConfig
from configs.section import (
    AddedLater,
    Digest,
    Fraction,
    MaskRange,
    Momentum,
    NotBool,
    Number,
    Section,
    SmallPositive,
    Temperature,
    Weight,
)


class Clip(Section):
    """Contrastive loss of images and captions (model/losses/clip.py): InfoNCE or SigLIP's sigmoid loss."""

    weight: Weight = 1.0
    kind: Literal["softmax", "sigmoid"] = "softmax"


class Ssl(Section):
    """ssl = DINO over pairs of views + iBOT over masked patches + koleo * KoLeo; see also `TeacherSchedule`."""

    weight: Weight = 1.0
    koleo: Weight = 0.1  # [I]
    student_temp: Temperature = 0.1
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    centre_momentum: Momentum = 0.9  # with targets=centering


class LatentNoise(Section):
    """Noise on the decoder's input latents in training (l-DeTok, arXiv 2507.15856).

    For latents x of an image, t ~ U(0, 1) is drawn once an image and e ~ N(0, scale^2) for each number.
    """

    # interpolative: (1 - t) x + t e; additive: x + t e, which was worse in the paper
    kind: Literal["none", "interpolative", "additive"] = "none"
    scale: Number = Field(3.0, gt=0, le=1e3)  # of l-DeTok

    @model_validator(mode="after")
    def _scale_has_an_effect(self) -> LatentNoise:
        if self.kind == "none" and self.scale != type(self).model_fields["scale"].default:
            raise ValueError(
                f"scale={self.scale:g} but kind=none: there is no noise to scale; set objectives.rec.noise.kind, or "
                "remove the scale"
            )
        return self


class AlignmentConfig(Section):
    """Align latents with the features of a frozen encoder, as VA-VAE (arXiv 2501.01423, section 3.2).

    Defaults are those of the last stage of its published training; the first has weight 0.5 and no margins.
    """

    kind: Literal["trunk", "dinov2"] = "trunk"  # trunk: of a weights file of ours; dinov2: VA-VAE's choice [P]
    weights: str  # file of the encoder; DINOv2's in the format of transformers or timm. Its path is not science
    sha256: str | None = None  # of the file's tensors: filled in at the start; if given, the file must match
    encoder: Vit  # as in the file; the linear map from latents to its width is part of this run's model
    patch_size: SmallPositive = 16  # of the encoder; DINOv2's is 14
    registers: Annotated[int, Field(ge=0, le=1024), NotBool] = 0  # of the encoder
    weight: Number = Field(0.1, gt=0, le=1e6)  # beside l1 and perceptual
    cosine_margin: Fraction = 0.5  # m1: a latent's cosine with its feature is not pushed above 1 - m1
    distance_margin: Fraction = 0.25  # m2: cosines of a pair of latents and of features may differ by this much
    adaptive: bool = True  # weight x ratio of the gradient norms at the encoder's last layer; False: weight alone

    @model_validator(mode="after")
    def _dinov2_blocks_have_no_options(self) -> AlignmentConfig:
        vit = self.encoder
        if self.kind == "dinov2" and vit != Vit(width=vit.width, depth=vit.depth, heads=vit.heads):
            raise ValueError(
                "kind=dinov2 with more in encoder than width, depth and heads: its blocks are DINOv2's, whatever else "
                "is set; remove the rest"
            )
        return self


def require_lpips_weights(perceptual: float, weights: str | None, sha256: str | None) -> None:
    """Raise ValueError if a perceptual term, or a digest, has no file with LPIPS weights."""
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
    """rec = l1 * L1 + l2 * mean square + perceptual * LPIPS + kl * KL, plus the two terms of `align`.

    `noise` disturbs the decoder's input latents, `mask` hides patches from the encoder; both in training only.
    """

    weight: Weight = 0.1  # [P]
    l1: Weight = 1.0
    l2: Weight = 0.0  # mean square; l-DeTok's 1, with l1 at 0
    perceptual: Weight = 1.0  # L1 : LPIPS = 1 : 1 [P]; needs lpips_weights
    lpips_weights: str | None = None  # safetensors with VGG-16 features and LPIPS heads
    # sha256 of its tensors: filled in at the start; if given, the file must match
    lpips_sha256: Annotated[Digest | None, AddedLater()] = None
    kl: Weight = 0.0  # KL in nats an image, with model.latent=gaussian; l-DeTok's 1e-6
    noise: LatentNoise = LatentNoise()
    mask: MaskRange | None = None  # fraction of patches hidden from the encoder, U(low, high); l-DeTok's -0.1, 0.7
    align: AlignmentConfig | None = None  # no part of VTP: the baseline it is compared with

    @model_validator(mode="after")
    def _perceptual_is_explicit(self) -> Rec:
        require_lpips_weights(self.perceptual if self.weight else 0.0, self.lpips_weights, self.lpips_sha256)
        return self

    @model_validator(mode="after")
    def _rec_has_a_pixel_loss(self) -> Rec:
        if self.weight and not (self.l1 or self.l2 or self.perceptual):
            raise ValueError(
                f"weight={self.weight:g} but l1, l2 and perceptual are 0: the reconstruction is compared with nothing; "
                "set one of objectives.rec.l1, l2, perceptual"
            )
        return self

    @model_validator(mode="after")
    def _alignment_comes_with_rec(self) -> Rec:
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
    def _nothing_is_set_without_weight(self) -> Rec:
        is_set = {"noise.kind": self.noise.kind != "none", "mask": self.mask is not None, "kl": self.kl > 0}
        for key in (key for key in is_set if is_set[key] and not self.weight):
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


class TeacherSchedule(Section):
    """Momentum and temperature of the EMA teacher: schedules over optim.steps (engine/schedule.py)."""

    momentum: Fraction = 0.994
    final_momentum: Fraction = 1.0  # reached by a cosine; equal to momentum for a fixed one
    temp: Temperature = 0.04
    final_temp: Temperature = 0.07
    temp_warmup: Fraction = 0.3  # fraction of steps from temp to final_temp


class Init(Section):
    """Weights to start from (engine/initial_weights.py); without a file, all are initialised (model/initialise.py)."""

    weights: str | None = None  # a weights file of ours; its path is not science, its content is
    sha256: str | None = None  # of its tensors: filled in at the start; if given, the file must match

    @model_validator(mode="after")
    def _digest_has_a_file(self) -> Init:
        if self.sha256 and self.weights is None:
            raise ValueError(f"sha256={self.sha256} of no file: give init.weights too, or remove init.sha256")
        return self


class Config(RunConfig):
    """Config of pre-training a tokenizer; `RunConfig` has what all kinds of runs share."""

    unhashed_paths: ClassVar[dict[str, Any]] = {"init": {"weights"}, "objectives": {"rec": {"align": {"weights"}}}}
    digest_keys: ClassVar[dict[str, str]] = {
        "data.tokenizer": "data.tokenizer_sha256",
        "objectives.rec.lpips_weights": "objectives.rec.lpips_sha256",
    }

    kind: Literal["pretraining"] = "pretraining"
    data: ImageTextData
    batch: BatchSizes
    views: Views = Views()
    masks: Masks = Masks()
    model: Model
    init: Init = Init()
    objectives: Objectives
    teacher: TeacherSchedule = TeacherSchedule()
    ema: Momentum | None = None  # of an average of the trained weights, which is what the run then writes; none in VTP

    @property
    def samples_per_step(self) -> int:
        """Image-text pairs a step over all ranks; the images of ssl and rec are among them."""
        return self.batch.clip

    @property
    def streams(self) -> int:
        """Number of sample streams: data.streams."""
        return self.data.streams

    def check_world(self, world_size: int) -> None:
        """Raise UserError if `world_size` does not divide the sample streams."""
        self.data.check_world(world_size)

    @model_validator(mode="after")
    def _crops_hold_whole_patches(self) -> Config:
        patch = self.model.patch_size
        for key in ("image_size", "global_size", "local_size"):
            size = getattr(self.views, key)
            if size % patch:
                raise ValueError(
                    f"views.{key}={size} is not a multiple of model.patch_size={patch}: a crop holds whole "
                    f"patches; change views.{key}"
                )
        return self

    @model_validator(mode="after")
    def _the_frozen_encoder_sees_whole_patches(self) -> Config:
        align, size = self.objectives.rec.align, self.views.image_size
        if align is not None and align.kind == "trunk" and size % align.patch_size:
            raise ValueError(
                f"views.image_size={size} is not a multiple of objectives.rec.align.patch_size={align.patch_size}: the "
                "frozen encoder sees the images that are reconstructed; change either"
            )
        return self

    @model_validator(mode="after")
    def _convolutions_only_reconstruct(self) -> Config:
        if self.model.conv is None:
            return self
        rec, conv = self.objectives.rec, "model.conv is set, a convolutional autoencoder, but "
        for key in ("clip", "ssl"):
            if getattr(self.objectives, key).weight:
                raise ValueError(
                    f"{conv}objectives.{key}.weight={getattr(self.objectives, key).weight:g}: it has no CLS token, and "
                    f"learns to reconstruct alone; set objectives.{key}.weight=0"
                )
        if rec.mask is not None:
            raise ValueError(
                f"{conv}objectives.rec.mask={list(rec.mask)}: a convolution sees whole images; remove the mask"
            )
        if self.system.linear != "bf16":
            raise ValueError(
                f"{conv}system.linear={self.system.linear}: FP8 is for the blocks of transformers, and there are none; "
                "set system.linear=bf16"
            )
        return self

    @model_validator(mode="after")
    def _rows_come_with_weights(self) -> Config:
        for key in ("ssl", "rec"):
            rows, weight = getattr(self.batch, key), getattr(self.objectives, key).weight
            if (rows > 0) != (weight > 0):
                raise ValueError(
                    f"batch.{key}={rows} but objectives.{key}.weight={weight:g}: an objective has both rows "
                    "and weight or neither; set both or neither to 0"
                )
        return self

    @model_validator(mode="after")
    def _gaussian_latents_have_rec_and_kl_has_gaussian_latents(self) -> Config:
        rec, latent = self.objectives.rec, self.model.latent
        if latent == "gaussian" and not rec.weight:
            raise ValueError(
                "model.latent=gaussian but objectives.rec.weight=0: only rec reads a variance; set model.latent="
                "deterministic, or train rec"
            )
        if rec.kl and latent != "gaussian":
            raise ValueError(
                f"objectives.rec.kl={rec.kl:g} but model.latent={latent}: a point has no divergence; set model.latent="
                "gaussian, or remove objectives.rec.kl"
            )
        return self

    @model_validator(mode="after")
    def _streams_share_rows(self) -> Config:
        streams = self.data.streams
        for key in ("clip", "ssl", "rec"):
            rows = getattr(self.batch, key)
            if rows % streams:
                raise ValueError(
                    f"batch.{key}={rows} is not a multiple of data.streams={streams}: every step takes the "
                    f"same number of rows from each stream; change batch.{key} or data.streams"
                )
        return self

    @model_validator(mode="after")
    def _fp8_needs_bf16(self) -> Config:
        if self.system.linear != "bf16" and self.optim.precision != "bf16":
            raise ValueError(
                f"system.linear={self.system.linear} but optim.precision={self.optim.precision}: FP8 products take and "
                "give bf16; set optim.precision=bf16, or system.linear=bf16"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Config:
        parts, batch = self.system.clip.micro_batches, self.batch
        if parts == 1:
            return self
        given = f"system.clip.micro_batches={parts}"
        if self.model.conv is None and self.model.trunk.drop_path:
            raise ValueError(
                f"{given} but model.trunk.drop_path={self.model.trunk.drop_path}: each part would drop segments of its "
                "own, and the gradient would not be that of the whole batch; set one of them off"
            )
        if not self.objectives.clip.weight:
            raise ValueError(f"{given} but objectives.clip.weight=0: there is no clip batch to cut; leave it at 1")
        if batch.clip % parts:
            raise ValueError(
                f"{given} does not divide batch.clip={batch.clip}: parts are equal, so that they share one compiled "
                "graph; change either"
            )
        first, size = (batch.ssl if batch.layout == "disjoint" else 0), batch.clip // parts
        if batch.rec and first // size != (first + batch.rec - 1) // size:
            raise ValueError(
                f"{given} cuts batch.clip={batch.clip} into parts of {size} rows, and the rec rows {first} to "
                f"{first + batch.rec - 1} lie in more than one: rec reads the features of one part; lower "
                "system.clip.micro_batches or batch.rec"
            )
        return self

    @model_validator(mode="after")
    def _batches_of_one_have_an_objective(self) -> Config:
        objectives, batch = self.objectives, self.batch
        if objectives.clip.weight and objectives.clip.kind == "softmax" and batch.clip == 1:
            raise ValueError(
                "batch.clip=1 with objectives.clip.kind=softmax: the one caption is always right, and nothing is "
                "learnt; raise batch.clip, set objectives.clip.kind=sigmoid, or objectives.clip.weight=0"
            )
        if objectives.ssl.weight and objectives.ssl.koleo and batch.ssl == 1:
            raise ValueError(
                f"batch.ssl=1 with objectives.ssl.koleo={objectives.ssl.koleo:g}: KoLeo pushes an image away from its "
                "nearest neighbour, and one image has none; raise batch.ssl or set objectives.ssl.koleo=0"
            )
        return self

    @model_validator(mode="after")
    def _teacher_momentum_lets_it_learn(self) -> Config:
        teacher = self.teacher
        is_still = teacher.momentum == teacher.final_momentum == 1
        if is_still and self.objectives.ssl.weight and self.init.weights is None:
            raise ValueError(
                "teacher.momentum=1 and teacher.final_momentum=1: the teacher would stay at its random first weights; "
                "lower teacher.momentum, or give init.weights"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Config:
        weights = self.objectives
        if not (weights.clip.weight or weights.ssl.weight or weights.rec.weight):
            raise ValueError(
                "all three objective weights are 0: there is nothing to learn; set one of objectives.*.weight"
            )
        return self
