"""The section of the autoregressive generators: a transformer that orders latent tokens, a small diffusion head that
draws each of them.

    Autoregressive().order                  # "masked": MAR-B (arXiv 2406.11838)
    Autoregressive(order="raster")          # the same size as RasterAR

    order     what the transformer sees when it predicts a token                                known as
    masked    all tokens drawn so far, both ways; several tokens are drawn at once              MAR
    random    the tokens before it in an order of the sample's own, causally; one at a time     RandomAR
    raster    the tokens before it row by row, causally; one at a time                          RasterAR

*Science*: each of these changes results. Rules and tags as in configs/schema.py; [P] is the paper, [C] its public code.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import ClassDropout, MlpRatio, Number, Section, SmallPositive, Width, require_hidden_units


class MaskRatio(Section):
    """Share of a sample's tokens that are hidden in training: a normal around 1 of which [low, 1] is kept.

    A lower `low` costs more: the encoder has room for the share 1 - low of the tokens.
    """

    low: Annotated[Number, Field(gt=0.0, le=0.999)] = 0.7  # [P]
    std: Number = Field(0.25, ge=1e-3, le=1e3)  # [P]


class Head(Section):
    """The MLP that denoises one token, given what the transformer says of it."""

    width: Width = 1024  # [P]
    depth: SmallPositive = 6  # residual blocks [P]; 3 in the study of tokenizers, arXiv 2507.15856
    # "noise" is the published one [P]; "velocity" needs fewer steps to draw a token (docs/decisions/generators.md).
    objective: Literal["noise", "velocity"] = "noise"
    repeats: SmallPositive = 4  # noise levels a token meets in one step, on average [P]


class Autoregressive(Section):
    """MAR-B as it stands; `order` makes it RandomAR or RasterAR."""

    model: Literal["autoregressive"] = "autoregressive"
    order: Literal["masked", "random", "raster"] = "masked"
    width: Width = 768  # [P]
    depth: SmallPositive = 24  # blocks in all; with order=masked half of them encode and half decode [P]
    heads: SmallPositive = 12  # [P]
    mlp_ratio: MlpRatio = 4.0  # [P]
    patch: SmallPositive = 1  # latents on a side of one token [P]
    buffer: SmallPositive = 64  # copies of the class embedding before the tokens [P]
    class_dropout: ClassDropout = 0.1  # share of samples that are trained without their class [P]
    mask_ratio: MaskRatio = MaskRatio()  # of order=masked
    head: Head = Head()

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
    def _masks_belong_to_masked(self) -> Autoregressive:
        if self.order != "masked" and self.mask_ratio != MaskRatio():
            raise ValueError(
                f"mask_ratio with order={self.order}: a causal order hides nothing; remove it, or set order=masked"
            )
        return self
