"""A generator and its training: a model of a tokenizer's latents, conditioned on a class.

    Diffusion(width=768, depth=12, heads=12)             # LightningDiT-B/1: {width: 768, depth: 12, heads: 12} in YAML
    Diffusion(width=768, depth=12, heads=12, **SIT)      # SiT-B/1: and mlp: gelu, norm: layernorm, ...
    Diffusion(width=768, depth=12, heads=12, **DIT)      # DiT-B/1: SiT's and objective: noise, variance: learnt
    Autoregressive().order                               # "masked": MAR-B (arXiv 2406.11838)
    Autoregressive(order="raster")                       # RasterAR of the same size
    load_run("configs/lightningdit_b.yaml", ["latents.train=latents/vtp_b"]).batch.samples      # 1024

    size     width, depth, heads
    B        768, 12, 12 [P]
    XL       1152, 28, 16 [P]
    demo     192, 6, 3 [D]

*Science*: every setting of the generator changes results. Rules and tags as in configs/schema.py; here [P] is the
paper, [C] the code of the kind named beside it: LightningDiT (arXiv 2501.01423), SiT (arXiv 2401.08740), DiT
(arXiv 2212.09748), MAR (arXiv 2406.11838).

The config holds no tokenizer: its latents are written beforehand (`python -m evaluation.latents`), so one tokenizer
serves many generators, and one generator any tokenizer (engine/tasks/generator.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from configs.run import RunConfig
from configs.section import (
    AddedLater,
    ClassDropout,
    MlpRatio,
    Momentum,
    Number,
    Positive,
    Section,
    SmallPositive,
    UserError,
    Weight,
    Width,
    require_hidden_units,
)


class TimeDistribution(Section):
    """Distribution of training times along the path; time 0 is noise, time 1 a latent."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"  # LightningDiT [P]; DiT, SiT: uniform [P]
    mean: Number = Field(0.0, ge=-50, le=50)  # of logit(time) [P]; VTP: -0.5 for the latents of S and B, -0.75 for L's
    std: Number = Field(1.0, ge=1e-3, le=50)  # [P]; VTP: 1.25 and 1.0

    @model_validator(mode="after")
    def _uniform_has_no_shape(self) -> TimeDistribution:
        if self.kind == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"kind=uniform with mean={self.mean:g}, std={self.std:g}: only logit-normal times have them; remove "
                "both, or set kind=logit_normal"
            )
        return self


class Diffusion(Section):
    """A diffusion transformer over latents; the defaults are LightningDiT's."""

    model: Literal["diffusion"] = "diffusion"
    width: Width
    depth: SmallPositive
    heads: SmallPositive
    patch: SmallPositive = 1  # latents on a side of a token; 1 for 16-fold tokenizers [P]
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # hidden width * ratio * 2/3, or width * ratio; DiT, SiT: gelu [P]
    mlp_ratio: MlpRatio = 4.0  # [P]
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # DiT, SiT: layernorm, with nothing learnt [P]
    qk_norm: bool = False  # off in the published B and XL; steadies half precision at long runs [P]
    # rope [P]; DiT, SiT: fixed sines and cosines, added once [P]; "both" is what LightningDiT's code does [C].
    positions: Literal["rope", "sincos", "both"] = "rope"
    objective: Literal["velocity", "noise"] = "velocity"  # straight path, its velocity; DiT: DDPM's noise [P]
    variance: Annotated[Literal["fixed", "learnt"], AddedLater()] = "fixed"  # of the noise's way back; DiT: learnt [P]
    direction: Weight = 1.0  # weight of 1 - cos(velocity, predicted) [P]; SiT: 0 [P]
    times: TimeDistribution = TimeDistribution()
    time_scale: Number = Field(1.0, gt=0, le=1e6)  # times 0 to 1 are multiplied by it before they are embedded; 1 [C]
    class_dropout: ClassDropout = 0.1  # fraction trained without their class, for classifier-free guidance [P]

    @model_validator(mode="after")
    def _head_width(self) -> Diffusion:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} over heads={self.heads}: the head width must be a multiple of 4 (positions turn "
                "pairs on two axes); change width or heads"
            )
        require_hidden_units(self.width, self.mlp_ratio * (2 / 3 if self.mlp == "swiglu" else 1))
        return self

    @model_validator(mode="after")
    def _noise_has_no_velocity(self) -> Diffusion:
        found = (self.direction, self.times.kind, self.time_scale)
        if self.objective == "noise" and found != (0, "uniform", 1):
            raise ValueError(
                f"objective=noise with direction={found[0]:g}, times.kind={found[1]}, time_scale={found[2]:g}: DDPM "
                "draws its steps uniformly, counts them from 0 to 999 and predicts no velocity that had a direction; "
                "set direction=0, times.kind=uniform and time_scale=1, or objective=velocity"
            )
        return self

    @model_validator(mode="after")
    def _velocity_has_no_variance(self) -> Diffusion:
        if self.objective == "velocity" and self.variance == "learnt":
            raise ValueError(
                "variance=learnt with objective=velocity: only the steps of DDPM have one to learn; set "
                "variance=fixed, or objective=noise"
            )
        return self


# Settings in which the older kinds differ from the defaults.
SIT: dict[str, Any] = {
    "mlp": "gelu",
    "norm": "layernorm",
    "positions": "sincos",
    "direction": 0.0,
    "times": {"kind": "uniform"},
}
DIT: dict[str, Any] = {**SIT, "objective": "noise", "variance": "learnt"}


class MaskRatio(Section):
    """Fraction of a sample's tokens that are masked in training: a normal around 1, truncated to [low, 1].

    A lower `low` costs more: the encoder has room for the fraction 1 - low of the tokens.
    """

    low: Annotated[Number, Field(gt=0.0, le=0.999)] = 0.7  # [P]
    std: Number = Field(0.25, ge=1e-3, le=1e3)  # [P]


class DiffusionHeadConfig(Section):
    """MLP that denoises one token, conditioned on the transformer's output for it."""

    width: Width = 1024  # [P]
    depth: SmallPositive = 6  # residual blocks [P]; 3 in the study of tokenizers, arXiv 2507.15856
    # "noise" is the published one [P]; "velocity" needs fewer steps to draw a token (docs/decisions/generators.md).
    objective: Literal["noise", "velocity"] = "noise"
    repeats: SmallPositive = 4  # noise levels drawn for a token in one step, on average [P]


class Autoregressive(Section):
    """A transformer over latent tokens and a diffusion head that draws each token. Defaults are MAR-B's.

    order     what the transformer sees when it predicts a token                                known as
    masked    all tokens drawn so far, bidirectionally; several tokens are drawn at once        MAR
    random    the tokens before it in a random order of the sample, causally; one at a time     RandomAR
    raster    the tokens before it in row-major order, causally; one at a time                  RasterAR
    """

    model: Literal["autoregressive"] = "autoregressive"
    order: Literal["masked", "random", "raster"] = "masked"
    width: Width = 768  # [P]
    depth: SmallPositive = 24  # blocks in all; with order=masked half of them encode and half decode [P]
    heads: SmallPositive = 12  # [P]
    mlp_ratio: MlpRatio = 4.0  # [P]
    patch: SmallPositive = 1  # latents on a side of one token [P]
    buffer: SmallPositive = 64  # copies of the class embedding before the tokens [P]
    class_dropout: ClassDropout = 0.1  # fraction of samples trained without their class [P]
    mask_ratio: MaskRatio = MaskRatio()  # with order=masked
    head: DiffusionHeadConfig = DiffusionHeadConfig()

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Autoregressive:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} over heads={self.heads}: heads share the width evenly; change either")
        require_hidden_units(self.width, self.mlp_ratio)
        return self

    @model_validator(mode="after")
    def _halves_are_equal(self) -> Autoregressive:
        if self.order == "masked" and self.depth % 2:
            raise ValueError(
                f"depth={self.depth} with order=masked: half of the blocks encode and half decode; give an even depth"
            )
        return self

    @model_validator(mode="after")
    def _only_masked_order_has_a_mask_ratio(self) -> Autoregressive:
        if self.order != "masked" and self.mask_ratio != MaskRatio():
            raise ValueError(
                f"mask_ratio with order={self.order}: a causal order hides nothing; remove it, or set order=masked"
            )
        return self


Generator: TypeAlias = Annotated[Diffusion | Autoregressive, Field(discriminator="model")]


class LatentData(Section):
    """A directory of latents (data/latents/store.py)."""

    train: str
    flip: bool = True  # half of the samples are latents of mirrored images [P of LightningDiT]
    tokenizer: str | None = None  # digest of the tokenizer that made them: filled in at the start; if given, must match


class GeneratorBatchSize(Section):
    """Latents a step."""

    samples: Positive = 1024  # over all ranks [P]


class GeneratorConfig(RunConfig):
    """Config of a generator's training on a tokenizer's latents."""

    kind: Literal["generator"] = "generator"
    latents: LatentData
    batch: GeneratorBatchSize = GeneratorBatchSize()
    generator: Generator
    ema: Momentum = 0.9999  # momentum of the average that is sampled from [P]

    @property
    def samples_per_step(self) -> int:
        """Latents a step over all ranks."""
        return self.batch.samples

    def check_world(self, world_size: int) -> None:
        """Raise UserError if `world_size` does not divide the batch."""
        if self.batch.samples % world_size:
            raise UserError(
                f"batch.samples={self.batch.samples} over {world_size} ranks: every rank takes as many; give a "
                "multiple of the ranks"
            )

    @model_validator(mode="after")
    def _no_setting_of_tokenizers(self) -> GeneratorConfig:
        defaults = {
            "system.linear": (self.system.linear, "bf16"),
            "system.clip.micro_batches": (self.system.clip.micro_batches, 1),
        }
        for key, (value, default) in defaults.items():
            if value != default:
                raise ValueError(f"{key}={value} is for pre-training tokenizers, generators know {default}; remove it")
        self.system.checks.refuse_pretraining()
        return self
