"""Heads between trunk features and losses: CLIP projection and DINO/iBOT prototypes.

    image_BE, text_BE, scale, bias = ClipHeads(384, clip_width=768, has_bias=False)(image_BD, text_BE)
    x_XE, prototypes_KE = PrototypeHead(384, Prototypes(num=65536))(x_XD)   # (X, 384) -> (X, 256), (65536, 256)

All outputs are normalised in float32; temperatures belong to the losses.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Prototypes

MAX_LOGIT_SCALE = math.log(100)  # [C]


class ClipHeads(nn.Module):
    """Project image features into the joint image-text space; holds the logit scale and the sigmoid loss's bias.

    Both have shape (1,), not (): ZeRO-3 cannot partition a 0-dimensional parameter.
    """

    def __init__(self, width: int, clip_width: int, has_bias: bool) -> None:
        super().__init__()
        self.visual_proj = nn.Linear(width, clip_width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))  # the logarithm of the scale
        self.logit_bias = nn.Parameter(torch.empty(1)) if has_bias else None

    def forward(self, image_BD: Tensor, text_BE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Both sides L2-normed (B, clip_width), exp(logit_scale) <= 100 and the bias; all float32."""
        image_BE = F.normalize(self.visual_proj(image_BD).float(), dim=-1)
        scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        return (
            image_BE,
            F.normalize(text_BE.float(), dim=-1),
            scale,
            None if self.logit_bias is None else self.logit_bias.float(),
        )


class WeightNormPrototypes(nn.Module):
    """K weight-normed prototypes g v / |v|, with length `weight_g` and direction `weight_v` learned separately.

    They are returned as an activation, because the losses compute the products and ZeRO-3 has the parameters here only.
    (For the same reason torch's weight norm does not work: its hook replaces the parameter by a plain tensor.)
    """

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num, 1))
        self.weight_v = nn.Parameter(torch.empty(num, width))

    def forward(self, x_XE: Tensor) -> tuple[Tensor, Tensor]:
        """(X, E) -> the rows L2-normalised, and the (K, E) prototypes, in the dtype of x."""
        prototypes_KE = self.weight_g.float() * F.normalize(self.weight_v.float(), dim=1)
        return F.normalize(x_XE.float(), dim=-1, eps=1e-12).to(x_XE.dtype), prototypes_KE.to(x_XE.dtype)


class PrototypeHead(nn.Module):
    """MLP with GELU, L2 norm, weight-normed prototypes; one head for CLS and patches alike [C of DINOv2]."""

    def __init__(self, width: int, prototypes: Prototypes) -> None:
        super().__init__()
        widths = [width, *[prototypes.hidden] * (prototypes.layers - 1), prototypes.bottleneck]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormPrototypes(prototypes.bottleneck, prototypes.num)

    def forward(self, x_XD: Tensor) -> tuple[Tensor, Tensor]:
        """(X, D) -> unit rows (X, E), prototypes (K, E); a logit is their product, cosine times learned length."""
        features: tuple[Tensor, Tensor] = self.last_layer(self.mlp(x_XD))
        return features
