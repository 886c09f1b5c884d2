"""The sections of a generator: a model of a tokenizer's latents, given a class.

    Diffusion(width=768, depth=12, heads=12)             # LightningDiT-B/1: {width: 768, depth: 12, heads: 12} in YAML
    Diffusion(width=768, depth=12, heads=12, **SIT)      # SiT-B/1: and mlp: gelu, norm: layernorm, ...
    Diffusion(width=768, depth=12, heads=12, **DIT)      # DiT-B/1: SiT's and objective: noise, variance: learnt

    size     width, depth, heads
    B        768, 12, 12 [P]
    XL       1152, 28, 16 [P]
    demo     192, 6, 3 [D]

*Science*: each of these changes results. Rules and tags as in configs/schema.py; here [P] is the paper, [C] the code
of the kind named beside it: LightningDiT (arXiv 2501.01423), SiT (arXiv 2401.08740), DiT (arXiv 2212.09748).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from configs.autoregressive import Autoregressive
from configs.section import (
    ClassDropout,
    Later,
    MlpRatio,
    Number,
    Section,
    SmallPositive,
    Weight,
    Width,
    require_hidden_units,
)


class Times(Section):
    """Which times of the path are trained on; time 0 is noise, time 1 a latent."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"  # LightningDiT [P]; DiT, SiT: uniform [P]
    mean: Number = Field(0.0, ge=-50, le=50)  # of logit(time) [P]; VTP: -0.5 for the latents of S and B, -0.75 for L's
    std: Number = Field(1.0, ge=1e-3, le=50)  # [P]; VTP: 1.25 and 1.0

    @model_validator(mode="after")
    def _uniform_has_no_shape(self) -> Times:
        if self.kind == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"kind=uniform with mean={self.mean:g}, std={self.std:g}: only logit-normal times have them; remove "
                "both, or set kind=logit_normal"
            )
        return self


class Diffusion(Section):
    """A transformer over latents that learns to undo noise; the defaults are LightningDiT's."""

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
    variance: Annotated[Literal["fixed", "learnt"], Later()] = "fixed"  # of the noise's way back; DiT: learnt [P]
    direction: Weight = 1.0  # weight of 1 - cos(velocity, predicted) [P]; SiT: 0 [P]
    times: Times = Times()
    time_scale: Number = Field(1.0, gt=0, le=1e6)  # times 0 to 1 are multiplied by it before they are embedded; 1 [C]
    class_dropout: ClassDropout = 0.1  # classes hidden in training, for guidance without a classifier [P]

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


# How the older kinds differ from the defaults.
SIT: dict[str, Any] = {
    "mlp": "gelu",
    "norm": "layernorm",
    "positions": "sincos",
    "direction": 0.0,
    "times": {"kind": "uniform"},
}
DIT: dict[str, Any] = {**SIT, "objective": "noise", "variance": "learnt"}

Generator: TypeAlias = Annotated[Diffusion | Autoregressive, Field(discriminator="model")]
