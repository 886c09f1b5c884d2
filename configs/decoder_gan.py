"""Stage 2: the decoder is fine-tuned with an adversarial loss; encoder and bottleneck stay frozen.

    Gan(balance="fixed", weight=0.1).kind        # "hinge"

*Science* except `system` and `profile`. Rules and tags as in configs/schema.py. VTP's own numbers are not published
(docs/recipe.md, "Stage 2"); a number is that of the paper named beside it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from configs.data import ImageData, ImageView
from configs.run import RunConfig
from configs.schema import require_lpips_weights
from configs.section import (
    AddedLater,
    Betas,
    ClipNorm,
    Digest,
    LearningRate,
    Momentum,
    NotBool,
    Number,
    Positive,
    Section,
    Weight,
    WeightDecay,
)

StartFraction = Annotated[Number, Field(ge=0.0, le=1.0)]  # 1: never, to measure stage 2 without the term


class Tokenizer(Section):
    """The trained tokenizer whose decoder is fine-tuned; its weights file describes its model."""

    weights: str  # a weights file of ours; its path is not science, its content is
    sha256: str | None = None  # of its tensors: filled in at the start; if given, the file must match


class DecoderBatchSize(Section):
    """Images a step."""

    images: Positive  # over all ranks; a multiple of data.streams


class Discriminator(Section):
    """PatchGAN (model/losses/gan.py) and its AdamW; steps, warm-up, eps and precision are the decoder's."""

    # Channels of the first layer; later group norms take 16 at a time
    width: Annotated[int, Field(ge=8, le=8192, multiple_of=8), NotBool] = 64
    layers: Annotated[int, Field(ge=1, le=6), NotBool] = 3
    lr: LearningRate = 2e-4  # peak, at optim.lr_batch images a step [D]
    betas: Betas = (0.5, 0.9)  # [D of VQGAN]: short averages, because the decoder it judges changes
    weight_decay: WeightDecay = 0.0
    clip_norm: ClipNorm = 1.0


class PixelLosses(Section):
    """Reconstruction losses: rec = l1 * L1 + perceptual * LPIPS; at least one has weight."""

    l1: Weight = 1.0
    perceptual: Weight = 1.0  # L1 : LPIPS = 1 : 1, as in stage 1 [P]; needs lpips_weights
    lpips_weights: str | None = None  # safetensors with VGG-16 features and LPIPS heads
    # sha256 of its tensors: filled in at the start; if given, the file must match
    lpips_sha256: Annotated[Digest | None, AddedLater()] = None

    @model_validator(mode="after")
    def _perceptual_is_explicit(self) -> PixelLosses:
        require_lpips_weights(self.perceptual, self.lpips_weights, self.lpips_sha256)
        if not (self.l1 or self.perceptual):
            raise ValueError("l1=0 and perceptual=0: nothing holds the decoder to the image; set one of them")
        return self


class Gan(Section):
    """The adversarial loss. The discriminator starts to learn first; the loss reaches the decoder later."""

    kind: Literal["hinge", "vanilla"] = "hinge"
    balance: Literal["adaptive", "fixed"] = "adaptive"  # adaptive: times |grad rec| / |grad gan| at the last layer
    weight: Number = Field(0.75, gt=0, le=1e6)  # adaptive 0.5 to 0.75, fixed about 0.1 [D of RAE, VA-VAE, l-DeTok]
    limit: Number = Field(1e4, gt=0, le=1e9)  # of the adaptive ratio [D of VQGAN]
    discriminator_start: StartFraction = 0.375  # of optim.steps: the discriminator steps from here on [D]
    start: StartFraction = 0.5  # of optim.steps: the term is in the decoder's loss from here on [D of l-DeTok]

    @model_validator(mode="after")
    def _the_discriminator_starts_first(self) -> Gan:
        if self.start < self.discriminator_start:
            raise ValueError(
                f"start={self.start:g} is before discriminator_start={self.discriminator_start:g}: the decoder would "
                "learn from a discriminator that has seen nothing; raise objectives.gan.start"
            )
        if self.balance == "fixed" and self.limit != Gan.model_fields["limit"].default:
            raise ValueError(
                f"limit={self.limit:g} but balance=fixed: it bounds the adaptive ratio alone; leave "
                "objectives.gan.limit out, or set objectives.gan.balance=adaptive"
            )
        return self


class DecoderObjectives(Section):
    """total = rec + gan.weight * ratio * gan, rec = l1 * L1 + perceptual * LPIPS; ratio is 1 with balance=fixed."""

    rec: PixelLosses  # no default: the perceptual term wants a decision
    gan: Gan = Gan()


class DecoderGan(RunConfig):
    """Config of a stage-2 run; `RunConfig` has what all kinds of runs share."""

    unhashed_paths: ClassVar[dict[str, Any]] = {"tokenizer": {"weights"}}
    digest_keys: ClassVar[dict[str, str]] = {"objectives.rec.lpips_weights": "objectives.rec.lpips_sha256"}

    kind: Literal["decoder_gan"] = "decoder_gan"
    tokenizer: Tokenizer
    data: ImageData
    batch: DecoderBatchSize
    views: ImageView = ImageView()
    objectives: DecoderObjectives
    discriminator: Discriminator = Discriminator()
    ema: Momentum = 0.999  # of the averaged decoder, which is what the run writes [D of l-DeTok]

    @property
    def samples_per_step(self) -> int:
        """Images a step over all ranks."""
        return self.batch.images

    @property
    def streams(self) -> int:
        """Number of sample streams: data.streams."""
        return self.data.streams

    def check_world(self, world_size: int) -> None:
        """Raise UserError if `world_size` does not divide the sample streams."""
        self.data.check_world(world_size)

    @model_validator(mode="after")
    def _streams_share_rows(self) -> DecoderGan:
        if self.batch.images % self.data.streams:
            raise ValueError(
                f"batch.images={self.batch.images} is not a multiple of data.streams={self.data.streams}: every step "
                "takes the same number of images from each stream; change either"
            )
        return self

    @model_validator(mode="after")
    def _the_discriminator_has_logits(self) -> DecoderGan:
        least = 3 * 2**self.discriminator.layers
        if self.views.image_size < least:
            raise ValueError(
                f"discriminator.layers={self.discriminator.layers} halve images of "
                f"views.image_size={self.views.image_size} until no logit is left: they need {least} pixels; lower "
                "discriminator.layers"
            )
        return self

    @model_validator(mode="after")
    def _system_has_an_effect(self) -> DecoderGan:
        if self.system.linear != "bf16":
            raise ValueError(
                f"system.linear={self.system.linear}: FP8 products serve pre-training; leave system.linear at bf16"
            )
        if self.system.clip.micro_batches != 1:
            raise ValueError(
                f"system.clip.micro_batches={self.system.clip.micro_batches}: there is no clip batch to cut; leave it "
                "at 1"
            )
        self.system.checks.refuse_pretraining()
        return self
