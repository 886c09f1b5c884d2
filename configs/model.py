"""Sections of the model: trunk, decoder, convolutional autoencoder, text tower, heads.

    Vit(width=768, depth=12, heads=12).mlp_ratio        # 4.0

*Science*: every setting changes results. Rules and tags as in configs/schema.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator, model_validator

from configs.section import Count, MlpRatio, NotBool, Number, Section, SmallPositive, Width, require_hidden_units


def _allow_none(value: Any, validate: Callable[[Any], Any]) -> Any:
    return None if value is None else validate(value)


def _none() -> Any:
    return None


class Vit(Section):
    """One transformer over patches: the trunk or the decoder."""

    width: Width
    depth: SmallPositive
    heads: SmallPositive
    mlp_ratio: MlpRatio = 4.0  # SwiGLU hidden = int(width * ratio * 2/3), aligned up to 8 [C]
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # eps 1e-5 / 1e-6 [C]
    qk_norm: bool = False
    layer_scale: Annotated[Number, Field(ge=0.0, le=100.0)] | None = None  # initial value; None is off [C]
    drop_path: Number = Field(0.0, ge=0, lt=1)  # fraction of segments a branch leaves out; not published, off [D]

    @model_validator(mode="after")
    def _head_dim(self) -> Vit:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} over heads={self.heads}: the head width must be a multiple of 4 (axial "
                "RoPE turns pairs on two axes); change width or heads"
            )
        require_hidden_units(self.width, self.mlp_ratio * 2 / 3)
        return self


class Conv(Section):
    """A convolutional autoencoder instead of trunk and decoder: latent diffusion's (arXiv 2112.10752).

    Each multiplier is one level of resolution, half of the one before; there are log2(patch_size) + 1 of them. Default
    channels, multipliers and blocks are those of its f16 and of VA-VAE, both of which attend on the coarsest level too;
    f8 has the multipliers 1, 2, 4, 4 and attends in the middle only [C of latent diffusion].
    """

    channels: Width = 128
    multipliers: Annotated[tuple[SmallPositive, ...], Field(min_length=1, max_length=12)] = (1, 1, 2, 2, 4)
    num_res_blocks: SmallPositive = 2  # in each level of the encoder; the decoder has one more
    groups: Width = 32  # of every norm
    attention_levels: Count = 0  # coarsest levels with attention after every residual block; the middle always attends

    @model_validator(mode="after")
    def _groups_share_channels(self) -> Conv:
        if self.channels % self.groups:
            raise ValueError(
                f"channels={self.channels} over groups={self.groups}: groups share the channels evenly; change either"
            )
        return self

    @model_validator(mode="after")
    def _attention_levels_exist(self) -> Conv:
        if self.attention_levels > len(self.multipliers):
            raise ValueError(
                f"attention_levels={self.attention_levels} but multipliers={list(self.multipliers)} make "
                f"{len(self.multipliers)} levels: give as many at most"
            )
        return self


class Text(Section):
    """Causal text transformer with end-of-text pooling [C]."""

    width: Width = 768
    depth: SmallPositive = 12
    heads: SmallPositive = 12
    context: Annotated[int, Field(ge=3, le=65_536), NotBool] = 77  # start, a word, end of text
    vocab: Annotated[int, Field(ge=3, le=2**24), NotBool] = 49_408
    mlp_ratio: MlpRatio = 4.0

    @model_validator(mode="after")
    def _head_dim(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} over heads={self.heads}: heads share the width evenly; change either")
        require_hidden_units(self.width, self.mlp_ratio)
        return self


class Prototypes(Section):
    """Prototype head shared by CLS and masked patches: MLP -> L2 norm -> weight-normed prototypes [D]."""

    num: Annotated[int, Field(ge=2, le=2**24), NotBool] = 65_536
    hidden: Width = 2048
    bottleneck: Width = 256
    layers: Annotated[int, Field(ge=2, le=64), NotBool] = 3


class Model(Section):
    """All networks: trunk, bottleneck, decoder, text tower, heads; with `conv`, convolutions replace trunk and decoder.

    A run builds those that its objectives with weight need (model/pretrainer.py).
    """

    patch_size: SmallPositive = 16
    latent_channels: Width = 64  # "f16d64" [P]
    latent: Literal["deterministic", "gaussian"] = "deterministic"  # a point [P], or mean and variance
    bottleneck_ae_only: bool = True  # heads read features before the bottleneck [C]; False: after it
    image_feature: Literal["cls", "patch_mean"] = "cls"
    clip_width: Width = 768  # width of the joint image-text space [C]
    registers: Annotated[int, Field(ge=0, le=1024), NotBool] = 0
    rope_base: Number = Field(100.0, ge=1, le=1e9)
    rope_dtype: Literal["bf16", "fp32"] = "bf16"  # the released weights keep the periods in bf16 [C]
    # Both required, unless `conv` is set: then both are None. Typed without None, because code reads them after
    # checking `conv`.
    trunk: Annotated[Vit, WrapValidator(_allow_none)] = Field(default_factory=_none)
    decoder: Annotated[Vit, WrapValidator(_allow_none)] = Field(default_factory=_none)
    conv: Conv | None = None
    text: Text = Text()
    prototypes: Prototypes = Prototypes()

    @model_validator(mode="after")
    def _transformers_or_convolutions(self) -> Model:
        for key in ("trunk", "decoder"):
            if self.conv is None and getattr(self, key) is None:
                raise ValueError(f"{key} is missing and has no default: give model.{key}, or model.conv for both")
            if self.conv is not None and getattr(self, key) is not None:
                raise ValueError(
                    f"conv and {key} are both set: convolutions stand in the place of trunk and decoder; remove "
                    f"model.conv or model.{key} (model.{key}=null)"
                )
        return self

    @model_validator(mode="after")
    def _conv_levels_match_the_patch_size(self) -> Model:
        if self.conv is None:
            return self
        patch = 2 ** (len(self.conv.multipliers) - 1)
        if patch != self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} but conv.multipliers={list(self.conv.multipliers)}: every level but the "
                f"first halves the resolution, which makes patches of {patch}; change either"
            )
        if self.registers:
            raise ValueError(
                f"registers={self.registers} but conv is set: registers are tokens of a transformer; set "
                "model.registers=0"
            )
        return self

    @model_validator(mode="after")
    def _the_decoder_has_no_drop_path(self) -> Model:
        if self.conv is None and self.decoder.drop_path:
            raise ValueError(
                f"decoder.drop_path={self.decoder.drop_path:g}: stochastic depth is the trunk's alone, every image of "
                "the decoder is reconstructed in full; set model.trunk.drop_path, or remove it"
            )
        return self
