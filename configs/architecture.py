"""The sections of the model: what the trunk, the decoder, the text tower and the heads are.

Rules and tags as in configs/schema.py, which holds the rest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Count, Positive, Section


class Vit(Section):
    """One transformer over patches: the trunk or the decoder."""

    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: float = Field(4.0, gt=0)  # SwiGLU hidden = int(width * ratio * 2/3), aligned up to 8 [C]
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # eps 1e-5 / 1e-6 [C]
    qk_norm: bool = False
    layer_scale: float | None = None  # initial value; None is off [C]
    drop_path: float = Field(0.0, ge=0, lt=1)  # share of segments a branch leaves out; not published, off [D]

    @model_validator(mode="after")
    def _head_dim(self) -> Vit:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} over heads={self.heads}: the head width must be a multiple of 4 (axial "
                "RoPE turns pairs on two axes); change width or heads"
            )
        return self


class Text(Section):
    """Causal text transformer with end-of-text pooling [C]."""

    width: Positive = 768
    depth: Positive = 12
    heads: Positive = 12
    context: Positive = 77
    vocab: Positive = 49_408
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _head_dim(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} over heads={self.heads}: heads share the width evenly; change either")
        return self


class Prototypes(Section):
    """The one head shared by CLS and masked patches: MLP -> L2 norm -> weight-normed prototypes [D]."""

    num: Positive = 65_536
    hidden: Positive = 2048
    bottleneck: Positive = 256
    layers: Annotated[int, Field(ge=2)] = 3


class Model(Section):
    patch_size: Positive = 16
    latent_channels: Positive = 64  # "f16d64" [P]
    latent: Literal["deterministic", "gaussian"] = "deterministic"  # point [P], or mean and variance
    bottleneck_ae_only: bool = True  # heads read features before the bottleneck [C]; False: after it
    image_feature: Literal["cls", "patch_mean"] = "cls"
    clip_width: Positive = 768  # width of the joint image-text space [C]
    registers: Count = 0
    rope_base: float = Field(100.0, gt=0)
    rope_dtype: Literal["bf16", "fp32"] = "bf16"  # the released weights keep the periods in bf16 [C]
    trunk: Vit
    decoder: Vit
    text: Text = Text()
    prototypes: Prototypes = Prototypes()

    @model_validator(mode="after")
    def _the_decoder_drops_nothing(self) -> Model:
        if self.decoder.drop_path:
            raise ValueError(
                f"decoder.drop_path={self.decoder.drop_path:g}: stochastic depth is the trunk's alone, every image of "
                "the decoder is reconstructed in full; set model.trunk.drop_path, or remove it"
            )
        return self
