"""The block of a diffusion generator: a trunk's, with shift, scale and gate from the condition (AdaLN-zero, DiT).

    block = ModulatedBlock(Diffusion(width=768, depth=12, heads=12), backend="sdpa")
    x_TD = block(x_TD, condition_BD, rope_2TE)          # B samples of T / B tokens each, one after the other

The modulation starts at zero, so a fresh block is the identity: gates of 0.

One leaf under ZeRO-3 and one compiled graph, as model/block.py says of its own; x_TD comes out of the embedding and
requires a gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from configs.architecture import Vit
from configs.generator import Diffusion
from model.block import Attention, RmsNorm, SwiGlu


class PlainLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-6) over the last axis, in float32, with nothing learnt."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


class GeluMlp(nn.Module):
    """w2(gelu(w1 x)), with the tanh form of GELU [C]."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, int(width * ratio))
        self.w2 = nn.Linear(int(width * ratio), width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), each token by itself."""
        return self.w2(F.gelu(self.w1(x_TD), approximate="tanh"))


class ModulatedBlock(nn.Module):
    """x + gate * attention(modulated norm1(x)), then x + gate * mlp(modulated norm2(x))."""

    def __init__(self, section: Diffusion, backend: str) -> None:
        super().__init__()
        width = section.width
        vit = Vit(width=width, depth=section.depth, heads=section.heads, qk_norm=section.qk_norm)
        self.norm1, self.norm2 = norm_of(section), norm_of(section)
        self.attn = Attention(vit, backend)
        self.mlp = (SwiGlu if section.mlp == "swiglu" else GeluMlp)(width, section.mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_TD: Tensor, condition_BD: Tensor, rope_2TE: Tensor | None) -> Tensor:
        """(T, D) -> (T, D); None for `rope_2TE` where positions were added to the tokens."""
        samples = condition_BD.shape[0]
        segments = ((samples, x_TD.shape[0] // samples),)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition_BD)).chunk(6, dim=1)
        x_TD = x_TD + gated(self.attn(modulated(self.norm1(x_TD), shift1, scale1), rope_2TE, segments), gate1)
        return x_TD + gated(self.mlp(modulated(self.norm2(x_TD), shift2, scale2)), gate2)


def modulated(x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, with each sample's own; T = B N tokens, sample by sample."""
    x_BND = x_TD.unflatten(0, (shift_BD.shape[0], -1))
    return (x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)).flatten(0, 1)


def gated(x_TD: Tensor, gate_BD: Tensor) -> Tensor:
    """x gate, with each sample's own."""
    return (x_TD.unflatten(0, (gate_BD.shape[0], -1)) * gate_BD.unsqueeze(1)).flatten(0, 1)


def norm_of(section: Diffusion) -> nn.Module:
    """The norm `section` asks for."""
    return RmsNorm(section.width) if section.norm == "rmsnorm" else PlainLayerNorm()
