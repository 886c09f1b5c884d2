"""The block of the autoregressive generators: pre-norm attention, pre-norm MLP, as in the original ViT (MAR [C]).

Positions are in the tokens already. Which tokens see which is told from outside:

    block(x_TD, segments=((B, 320),))                       # every token of a sample all others of it
    block(x_TD, segments=((B, 141),), spans=spans)          # those of its span: known tokens, and those left to fill up
    block(x_TD, segments=((B, 319),))                       # of a causal block: itself and those before it
    block(x_TD, segments=((B, 1),), past=past)              # one token more after those of `past`, which grows

MAR's dropout of 0.1 is left out: blocks draw no random numbers. A leaf under ZeRO-3 and one compiled graph, as
model/block.py says of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.autoregressive import Autoregressive
from kernels.attention import attend
from kernels.dense_attention import Segments, Spans
from model.block import LayerNorm
from model.generator.modulated_block import GeluMlp


class Past:
    """Keys and values of the tokens that a causal block has seen, of all samples; room for `most` of each sample's."""

    def __init__(self, samples: int, most: int) -> None:
        self.samples, self.most, self.length = samples, most, 0
        self._keys_values: Tensor | None = None  # (2, B, most, H, E), made when the first ones come

    def extended(self, k_THE: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, length, H, E), after equally many new ones of every sample."""
        new = torch.stack((k_THE, v_THE)).unflatten(1, (self.samples, -1))
        if self._keys_values is None:
            self._keys_values = new.new_empty(2, self.samples, self.most, *new.shape[3:])
        end = self.length + new.shape[2]
        self._keys_values[:, :, self.length : end] = new
        self.length = end
        k_BMHE, v_BMHE = self._keys_values[:, :, :end]
        return k_BMHE, v_BMHE


class TokenAttention(nn.Module):
    """Multi-head self-attention within samples; with `is_causal` a token sees itself and those before it."""

    def __init__(self, section: Autoregressive, is_causal: bool, backend: str) -> None:
        super().__init__()
        self.heads, self.is_causal, self.backend = section.heads, is_causal, backend
        self.qkv = nn.Linear(section.width, 3 * section.width)
        self.proj = nn.Linear(section.width, section.width)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans | None, past: Past | None) -> Tensor:
        """(T, D) normed tokens -> (T, D)."""
        q_THE, k_THE, v_THE = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).unbind(1)
        if past is None:
            out_THE = attend(q_THE, k_THE, v_THE, segments, self.is_causal, self.backend, spans)
        else:
            out_THE = _attend_to_past(q_THE, k_THE, v_THE, past)
        return self.proj(out_THE.flatten(1))


class TokenBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, section: Autoregressive, is_causal: bool, backend: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(section.width)
        self.attn = TokenAttention(section, is_causal, backend)
        self.norm2 = LayerNorm(section.width)
        self.mlp = GeluMlp(section.width, section.mlp_ratio)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans | None = None, past: Past | None = None) -> Tensor:
        """(T, D) -> (T, D), samples one after the other."""
        x_TD = x_TD + self.attn(self.norm1(x_TD), segments, spans, past)
        return x_TD + self.mlp(self.norm2(x_TD))


def _attend_to_past(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, past: Past) -> Tensor:
    """Queries of new tokens, keys of all so far; causal. Several new ones may come at the beginning only."""
    is_first = past.length == 0
    k_BMHE, v_BMHE = past.extended(k_THE, v_THE)
    q_BNHE = q_THE.unflatten(0, (past.samples, -1))
    assert is_first or q_BNHE.shape[1] == 1, "tokens come one by one"
    q, k, v = (t.transpose(1, 2) for t in (q_BNHE, k_BMHE, v_BMHE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_first).transpose(1, 2).flatten(0, 1)
