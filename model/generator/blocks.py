"""Building blocks of the generators: embeddings of time and class, and the two kinds of transformer blocks.

    condition_BD = TimeEmbedding(768)(time_B, dtype) + ClassEmbedding(1000, 768)(labels_B)     # label 1000: no class
    block = ModulatedBlock(Diffusion(width=768, depth=12, heads=12), backend="sdpa")
    x_TD = block(x_TD, condition_BD, rope_2TE)          # B samples of T / B tokens each, one after the other

ModulatedBlock is the trunk's block with shift, scale and gate from the condition (AdaLN-zero, DiT). The modulation
starts at zero, so a fresh block is the identity. The time is not rescaled: 0 to 1 on the straight path, as in SiT and
LightningDiT, 0 to 999 with DDPM's steps [C]. With generator.time_scale=1000 it is 0 to 1000 on both, which short runs
learn from faster (docs/decisions/generators.md).

TokenBlock, of the autoregressive generators, has pre-norm attention and MLP as in the original ViT (MAR [C]). Positions
are in the tokens already; arguments select which tokens see which:

    block(x_TD, segments=((B, 320),))                       # every token of a sample sees all others of it
    block(x_TD, segments=((B, 141),), spans=spans)          # those of its span: known tokens, or padding
    block(x_TD, segments=((B, 319),))                       # of a causal block: itself and those before it
    block(x_TD, segments=((B, 1),), cache=cache)            # one more token after those of `cache`, which grows

MAR's dropout of 0.1 is left out: blocks draw no random numbers. Both kinds are one leaf under ZeRO-3 and one compiled
graph, like model/block.py; x_TD is the output of an embedding and requires a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.generator import Autoregressive, Diffusion
from configs.model import Vit
from kernels.attention import Segments, Spans, attend
from model.block import Attention, LayerNorm, RmsNorm, SwiGlu

TIME_FREQUENCIES = 256  # sines and cosines together [C]
MAX_PERIOD = 10_000.0  # longest period, in units of the time over 2 pi [C]


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding, (...) -> (..., width) float32: cos, then sin, at width / 2 falling frequencies from 1."""
    exponents = torch.arange(width // 2, device=position.device, dtype=torch.float32) / (width // 2)
    angles = position.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(TIME_FREQUENCIES, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, time_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) float32 -> (B, width) in `dtype`."""
        return self.linear2(F.silu(self.linear1(sinusoids(time_B, TIME_FREQUENCIES).to(dtype))))


class ClassEmbedding(nn.Module):
    """One learned vector a class, and a last one for no class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        """(B,) int64 in 0 .. num_classes -> (B, width)."""
        return self.table(labels_B)


class PlainLayerNorm(nn.Module):
    """Layer norm without parameters, in float32: (x - mean) / sqrt(variance + 1e-6) over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def build_norm(section: Diffusion) -> nn.Module:
    """Build the norm that `section` names."""
    return RmsNorm(section.width) if section.norm == "rmsnorm" else PlainLayerNorm()


class GeluMlp(nn.Module):
    """MLP w2(gelu(w1 x)), with the tanh form of GELU [C]."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, int(width * ratio))
        self.w2 = nn.Linear(int(width * ratio), width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), token by token."""
        return self.w2(F.gelu(self.w1(x_TD), approximate="tanh"))


def modulate(x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Modulate tokens: x (1 + scale) + shift, each sample with its own; T = B N tokens, sample by sample."""
    x_BND = x_TD.unflatten(0, (shift_BD.shape[0], -1))
    return (x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)).flatten(0, 1)


def gate(x_TD: Tensor, gate_BD: Tensor) -> Tensor:
    """Gate tokens: x gate, each sample with its own."""
    return (x_TD.unflatten(0, (gate_BD.shape[0], -1)) * gate_BD.unsqueeze(1)).flatten(0, 1)


class ModulatedBlock(nn.Module):
    """AdaLN-zero block: x + gate * attention(modulated norm1(x)), then x + gate * mlp(modulated norm2(x))."""

    def __init__(self, section: Diffusion, backend: str) -> None:
        super().__init__()
        width = section.width
        vit = Vit(width=width, depth=section.depth, heads=section.heads, qk_norm=section.qk_norm)
        self.norm1, self.norm2 = build_norm(section), build_norm(section)
        self.attn = Attention(vit, backend)
        self.mlp = (SwiGlu if section.mlp == "swiglu" else GeluMlp)(width, section.mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_TD: Tensor, condition_BD: Tensor, rope_2TE: Tensor | None) -> Tensor:
        """(T, D) -> (T, D); None for `rope_2TE` where positions were added to the tokens."""
        samples = condition_BD.shape[0]
        segments = ((samples, x_TD.shape[0] // samples),)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition_BD)).chunk(6, dim=1)
        x_TD = x_TD + gate(self.attn(modulate(self.norm1(x_TD), shift1, scale1), rope_2TE, segments), gate1)
        return x_TD + gate(self.mlp(modulate(self.norm2(x_TD), shift2, scale2)), gate2)


class TokenBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, section: Autoregressive, is_causal: bool, backend: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(section.width)
        self.attn = TokenAttention(section, is_causal, backend)
        self.norm2 = LayerNorm(section.width)
        self.mlp = GeluMlp(section.width, section.mlp_ratio)

    def forward(
        self, x_TD: Tensor, segments: Segments, spans: Spans | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), samples one after the other."""
        x_TD = x_TD + self.attn(self.norm1(x_TD), segments, spans, cache)
        return x_TD + self.mlp(self.norm2(x_TD))


class TokenAttention(nn.Module):
    """Multi-head self-attention within samples; with `is_causal` a token sees itself and those before it."""

    def __init__(self, section: Autoregressive, is_causal: bool, backend: str) -> None:
        super().__init__()
        self.heads, self.is_causal, self.backend = section.heads, is_causal, backend
        self.qkv = nn.Linear(section.width, 3 * section.width)
        self.proj = nn.Linear(section.width, section.width)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans | None, cache: KeyValueCache | None) -> Tensor:
        """(T, D) normed tokens -> (T, D)."""
        q_THE, k_THE, v_THE = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).unbind(1)
        if cache is None:
            out_THE = attend(q_THE, k_THE, v_THE, segments, self.is_causal, self.backend, spans)
        else:
            out_THE = _attend_to_cache(q_THE, k_THE, v_THE, cache)
        return self.proj(out_THE.flatten(1))


class KeyValueCache:
    """Keys and values of the tokens that a causal block has processed; room for `capacity` tokens per sample."""

    def __init__(self, samples: int, capacity: int) -> None:
        self.samples, self.capacity, self.length = samples, capacity, 0
        self._keys_values: Tensor | None = None  # (2, B, capacity, H, E), allocated at the first call

    def append(self, k_THE: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        """Append equally many keys and values of every sample; return all, (B, length, H, E)."""
        new = torch.stack((k_THE, v_THE)).unflatten(1, (self.samples, -1))
        if self._keys_values is None:
            self._keys_values = new.new_empty(2, self.samples, self.capacity, *new.shape[3:])
        end = self.length + new.shape[2]
        self._keys_values[:, :, self.length : end] = new
        self.length = end
        k_BMHE, v_BMHE = self._keys_values[:, :, :end]
        return k_BMHE, v_BMHE


def _attend_to_cache(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, cache: KeyValueCache) -> Tensor:
    """Causal attention of new tokens to all tokens so far. Several new tokens are allowed in the first call only."""
    is_first = cache.length == 0
    k_BMHE, v_BMHE = cache.append(k_THE, v_THE)
    q_BNHE = q_THE.unflatten(0, (cache.samples, -1))
    assert is_first or q_BNHE.shape[1] == 1, "after the first call, one token at a time"
    q, k, v = (t.transpose(1, 2) for t in (q_BNHE, k_BMHE, v_BMHE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_first).transpose(1, 2).flatten(0, 1)
