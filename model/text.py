"""The text tower of CLIP: a causal transformer whose end-of-text token speaks for the caption.

    tower = TextTower(Text(width=768, depth=12, heads=12), clip_width=768, backend="sdpa")
    tower(pack_captions(captions_BC))          # (B, 77) token ids -> (B, 768), not yet L2-normalised

Captions come packed (model/captions.py): several a row, each blind to its neighbours. LayerNorm eps is 1e-5, GELU is
exact [C]. Parameter names are those of open_clip: resblocks.N.attn.in_proj_weight,
mlp.c_fc, ln_final ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.architecture import Text
from kernels.attention import attend
from kernels.dense_attention import Segments, Spans
from model.block import LayerNorm
from model.captions import PackedCaptions


class TextAttention(nn.Module):
    """Causal multi-head self-attention within captions."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.in_product: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear  # system.linear may put another in place
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans) -> Tensor:
        """(T, D) normed tokens -> (T, D), each from its own caption up to itself."""
        qkv_T3HE = self.in_product(x_TD, self.in_proj_weight, self.in_proj_bias).unflatten(1, (3, self.heads, -1))
        q_THE, k_THE, v_THE = qkv_T3HE.unbind(1)
        out_THE = attend(q_THE, k_THE, v_THE, segments, causal=True, backend=self.backend, spans=spans)
        return self.out_proj(out_THE.flatten(1))


class TextMlp(nn.Module):
    """c_proj(gelu(c_fc x))."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(width * ratio))
        self.c_proj = nn.Linear(int(width * ratio), width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), each token by itself."""
        return self.c_proj(F.gelu(self.c_fc(x_TD)))


class TextBlock(nn.Module):
    """One residual block; like model.block.Block a leaf of ZeRO-3, one graph, and run once a step."""

    def __init__(self, text: Text, backend: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(text.width, eps=1e-5)
        self.attn = TextAttention(text.width, text.heads, backend)
        self.ln_2 = LayerNorm(text.width, eps=1e-5)
        self.mlp = TextMlp(text.width, text.mlp_ratio)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans) -> Tensor:
        """(T, D) -> (T, D): `segments` are R rows of C tokens, `spans` the captions in them."""
        x_TD = x_TD + self.attn(self.ln_1(x_TD), segments, spans)
        return x_TD + self.mlp(self.ln_2(x_TD))


class TextTower(nn.Module):
    """Token ids -> one vector per caption in the joint image-text space."""

    def __init__(self, text: Text, clip_width: int, backend: str) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(text.vocab, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.resblocks = nn.ModuleList(TextBlock(text, backend) for _ in range(text.depth))
        self.ln_final = LayerNorm(text.width, eps=1e-5)
        self.text_projection = nn.Parameter(torch.empty(text.width, clip_width))

    def forward(self, captions: PackedCaptions) -> Tensor:
        """B captions, positions below the context -> (B, clip_width)."""
        places_RCD = F.embedding(captions.positions_RC, self.positional_embedding)
        x_TD = (self.token_embedding(captions.tokens_RC) + places_RCD).flatten(0, 1)
        rows, width = captions.tokens_RC.shape
        for block in self.resblocks:
            x_TD = block(x_TD, ((rows, width),), captions.spans)
        return self.ln_final(x_TD.index_select(0, captions.ends_B)) @ self.text_projection
