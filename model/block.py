"""The transformer block shared by trunk and decoder: pre-norm attention with RoPE, pre-norm SwiGLU.

A block is the unit of everything the engine does: gathered as one leaf under ZeRO-3 and compiled as one
graph. Its forward is therefore a pure function of tensors and of `segments`, a tuple of integers that is
constant within a run. Norms are computed in float32 whatever the parameters are. No parameter here or
elsewhere is 0-dimensional: ZeRO-3 cannot partition such a one.

    block = Block(Vit(width=384, depth=12, heads=6), backend="sdpa")
    y_TD = block(x_TD, rope_2TE, segments=((64, 257), (128, 37)))       # (T, 384) -> (T, 384)

Parameter names are those of the public VTP layout, norm1, attn.qkv, attn.proj, norm2, mlp.w3, but for mlp.w12: its w1
above its w2, one product where the layout has two. model/public_layout.py takes them apart and together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.architecture import Vit
from kernels.attention import attend
from kernels.dense_attention import Segments
from model import block_backward
from model.drop_path import subset
from model.reads import Reads
from model.rope import turn


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight over the last axis, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class LayerScale(nn.Module):
    """One learned factor per channel on a residual branch; `initial` is its value before training."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.initial = initial

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x_TD * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention within segments; `qk_norm` norms queries and keys per head before RoPE."""

    def __init__(self, vit: Vit, backend: str) -> None:
        super().__init__()
        self.heads, self.backend, self.has_norms = vit.heads, backend, vit.qk_norm
        self.qkv = nn.Linear(vit.width, 3 * vit.width)
        self.proj = nn.Linear(vit.width, vit.width)
        head_width = vit.width // vit.heads
        self.q_norm = RmsNorm(head_width) if vit.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(head_width) if vit.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope_2TE: Tensor | None, segments: Segments) -> Tensor:
        """(T, D) normed tokens -> (T, D), each from the tokens of its own segment; `rope_2TE` holds their positions,
        None where the tokens themselves do."""
        if rope_2TE is not None and not self.has_norms and block_backward.is_used(x_TD):
            y_TN, bias_N = block_backward.product(self.qkv, x_TD)
            q_THE, k_THE, v_THE = block_backward.turned(y_TN, bias_N, rope_2TE, self.heads)
        else:
            q_THE, k_THE, v_THE = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).unbind(1)
            q_THE, k_THE = self.q_norm(q_THE), self.k_norm(k_THE)
            if rope_2TE is not None:
                q_THE, k_THE = turn(q_THE, rope_2TE), turn(k_THE, rope_2TE)
        return self.proj(attend(q_THE, k_THE, v_THE, segments, backend=self.backend).flatten(1))


class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = swiglu_hidden(width, ratio)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), each token by itself."""
        if block_backward.is_used(x_TD):
            return self.w3(block_backward.swiglu(*block_backward.product(self.w12, x_TD)))
        gate_TF, value_TF = self.w12(x_TD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_TF) * value_TF)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); with stochastic depth each for some segments only."""

    def __init__(self, vit: Vit, backend: str) -> None:
        super().__init__()
        self.drop_path = vit.drop_path
        self.norm1 = norm(vit)
        self.attn = Attention(vit, backend)
        self.ls1 = _scale(vit)
        self.norm2 = norm(vit)
        self.mlp = SwiGlu(vit.width, vit.mlp_ratio)
        self.ls2 = _scale(vit)

    def forward(
        self,
        x_TD: Tensor,
        rope_2TE: Tensor,
        segments: Segments,
        kept_idx_2K: Tensor | None = None,
        reads: Reads | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D). `rope_2TE` is Rope.packed of the layout whose Layout.segments are `segments`.

        `kept_idx_2K` names the tokens that attention and MLP see, as model.drop_path.Subset.tokens gives them; without
        it both see all. `reads`, for a last block without stochastic depth: the MLP sees these tokens only.
        """
        if kept_idx_2K is None:
            x_TD = x_TD + self._attention_branch(x_TD, rope_2TE, segments)
            return x_TD + self._mlp_branch(x_TD) if reads is None else reads.add(x_TD, self._mlp_branch)
        kept, (attn_K, mlp_K) = subset(segments, self.drop_path), kept_idx_2K.unbind()
        y_KD = self._attention_branch(x_TD.index_select(0, attn_K), rope_2TE.index_select(1, attn_K), kept.segments)
        x_TD = kept.add_back(x_TD, y_KD, attn_K)
        return kept.add_back(x_TD, self._mlp_branch(x_TD.index_select(0, mlp_K)), mlp_K)

    def _attention_branch(self, x_TD: Tensor, rope_2TE: Tensor, segments: Segments) -> Tensor:
        return self.ls1(self.attn(self.norm1(x_TD), rope_2TE, segments))

    def _mlp_branch(self, x_TD: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x_TD)))


def swiglu_hidden(width: int, ratio: float) -> int:
    """int(width * ratio * 2/3), aligned up to 8 [C]."""
    return -(-int(width * ratio * 2 / 3) // 8) * 8


def norm(vit: Vit) -> nn.Module:
    """The norm `vit` asks for, at its width."""
    return RmsNorm(vit.width) if vit.norm == "rmsnorm" else LayerNorm(vit.width)


def _scale(vit: Vit) -> nn.Module:
    return nn.Identity() if vit.layer_scale is None else LayerScale(vit.width, vit.layer_scale)
