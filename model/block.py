"""The transformer block of trunk and decoder: pre-norm attention with RoPE, pre-norm SwiGLU.

A block is the engine's unit: gathered as one leaf under ZeRO-3 and compiled as one graph. Its forward is therefore a
pure function of tensors and of `segments`, a tuple of integers that is constant within a run. Norms are computed in
float32 whatever the parameters are. No parameter is 0-dimensional: ZeRO-3 cannot partition such a one.

    block = Block(Vit(width=384, depth=12, heads=6), backend="sdpa")
    y_TD = block(x_TD, rope_2TE, segments=((64, 257), (128, 37)))       # (T, 384) -> (T, 384)

Parameter names are those of the public VTP layout, norm1, attn.qkv, attn.proj, norm2, mlp.w3, except mlp.w12: w1
stacked on w2, one product where the layout has two. model/public_layout.py splits and joins them.

The second half of the file holds custom backward passes for compiled blocks on a GPU, of which torch.compile makes one
kernel each:

    y_TN, bias_N = linear_with_detached_bias(self.w12, x_TD)        # the bias's gradient is left to the next line
    h_TF = fused_swiglu(y_TN, bias_N)                               # silu(gate) * value
    q_THE, k_THE, v_THE = rotated_qkv(y_TN, bias_N, rope_2TE, heads)    # RoPE applied to queries and keys

Values and gradients are those of the plain expressions. For these Inductor generates slow code, as seen for sm_90
(`python -m profiling.bench block_kernels`):

    - a bias's gradient, the sum over tokens, is a kernel of its own that reads the whole gradient once more. Here it is
      summed in groups of up to 32 neighbouring tokens, in float32, by the kernel that computes the gradient, and one
      thirty-second remains to be summed;
    - a gradient put together from parts (gate and value; q, k and v, each of two halves) is computed for every element
      of every part, and all but one are discarded. Here the part is an axis, and every element one expression of it;
    - as a result those kernels wait for instructions and not for memory.

In eager mode the plain expressions are as fast and are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Vit
from kernels.attention import Segments, attend
from model.packing import TokenSubset, kept_segments
from model.rope import apply_rope


class RmsNorm(nn.Module):
    """RMS norm over the last axis, in float32: x / sqrt(mean(x^2) + 1e-5) * weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in float32: (x - mean) / sqrt(variance + eps) * weight + bias."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def build_norm(vit: Vit) -> nn.Module:
    """Build the norm that `vit` names, at its width."""
    return RmsNorm(vit.width) if vit.norm == "rmsnorm" else LayerNorm(vit.width)


class LayerScale(nn.Module):
    """One learned factor per channel of a residual branch; `initial` is its value before training."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.initial = initial

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x_TD * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention within segments; with `qk_norm` queries and keys are normed per head before RoPE."""

    def __init__(self, vit: Vit, backend: str) -> None:
        super().__init__()
        self.heads, self.backend, self.has_norms = vit.heads, backend, vit.qk_norm
        self.qkv = nn.Linear(vit.width, 3 * vit.width)
        self.proj = nn.Linear(vit.width, vit.width)
        head_width = vit.width // vit.heads
        self.q_norm = RmsNorm(head_width) if vit.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(head_width) if vit.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope_2TE: Tensor | None, segments: Segments) -> Tensor:
        """(T, D) normed tokens -> (T, D), within segments; `rope_2TE` is None where tokens contain positions."""
        if rope_2TE is not None and not self.has_norms and uses_custom_backward(x_TD):
            y_TN, bias_N = linear_with_detached_bias(self.qkv, x_TD)
            q_THE, k_THE, v_THE = rotated_qkv(y_TN, bias_N, rope_2TE, self.heads)
        else:
            q_THE, k_THE, v_THE = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).unbind(1)
            q_THE, k_THE = self.q_norm(q_THE), self.k_norm(k_THE)
            if rope_2TE is not None:
                q_THE, k_THE = apply_rope(q_THE, rope_2TE), apply_rope(k_THE, rope_2TE)
        return self.proj(attend(q_THE, k_THE, v_THE, segments, backend=self.backend).flatten(1))


class SwiGlu(nn.Module):
    """SwiGLU MLP: w3(silu(w1 x) * w2 x)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = swiglu_hidden(width, ratio)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), token by token."""
        if uses_custom_backward(x_TD):
            return self.w3(fused_swiglu(*linear_with_detached_bias(self.w12, x_TD)))
        gate_TF, value_TF = self.w12(x_TD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_TF) * value_TF)


def swiglu_hidden(width: int, ratio: float) -> int:
    """Hidden width of SwiGLU: int(width * ratio * 2/3), rounded up to a multiple of 8 [C]."""
    return -(-int(width * ratio * 2 / 3) // 8) * 8


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    With stochastic depth each branch sees some segments only.
    """

    def __init__(self, vit: Vit, backend: str) -> None:
        super().__init__()
        self.drop_path = vit.drop_path
        self.norm1 = build_norm(vit)
        self.attn = Attention(vit, backend)
        self.ls1 = _layer_scale(vit)
        self.norm2 = build_norm(vit)
        self.mlp = SwiGlu(vit.width, vit.mlp_ratio)
        self.ls2 = _layer_scale(vit)

    def forward(
        self,
        x_TD: Tensor,
        rope_2TE: Tensor,
        segments: Segments,
        kept_idx_2K: Tensor | None = None,
        read_tokens: TokenSubset | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D). `rope_2TE` is Rope.packed of the layout that `segments` belong to.

        `kept_idx_2K` names the tokens that attention and MLP see, as model.packing.KeptSegments.tokens gives them;
        without it both see all. `read_tokens`, for a last block without stochastic depth: the MLP sees these tokens
        only.
        """
        if kept_idx_2K is None:
            x_TD = x_TD + self._attention_branch(x_TD, rope_2TE, segments)
            return x_TD + self._mlp_branch(x_TD) if read_tokens is None else read_tokens.add(x_TD, self._mlp_branch)
        kept, (attn_K, mlp_K) = kept_segments(segments, self.drop_path), kept_idx_2K.unbind()
        y_KD = self._attention_branch(x_TD.index_select(0, attn_K), rope_2TE.index_select(1, attn_K), kept.segments)
        x_TD = kept.add_back(x_TD, y_KD, attn_K)
        return kept.add_back(x_TD, self._mlp_branch(x_TD.index_select(0, mlp_K)), mlp_K)

    def _attention_branch(self, x_TD: Tensor, rope_2TE: Tensor, segments: Segments) -> Tensor:
        return self.ls1(self.attn(self.norm1(x_TD), rope_2TE, segments))

    def _mlp_branch(self, x_TD: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x_TD)))


def _layer_scale(vit: Vit) -> nn.Module:
    return nn.Identity() if vit.layer_scale is None else LayerScale(vit.width, vit.layer_scale)


BIAS_GROUP = 32  # tokens at most; Inductor reduces 32 rows of 128 columns in one tile without spilling registers


def uses_custom_backward(x: Tensor) -> bool:
    """Whether a block uses the custom backward passes: compiled, on a GPU, with a gradient."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_cuda


def linear_with_detached_bias(layer: nn.Module, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return layer(x), and the bias whose gradient is left to the caller; None where the layer (of FP8) computes it."""
    if type(layer) is not nn.Linear:
        return layer(x_TD), None
    return F.linear(x_TD, layer.weight, layer.bias.detach()), layer.bias


def fused_swiglu(y_TN: Tensor, bias_N: Tensor | None) -> Tensor:
    """SwiGLU's silu(gate) * value with custom backward; gate is the first half of y's columns: (T, 2F) -> (T, F)."""
    h_TF: Tensor = _FusedSwiGlu.apply(y_TN, bias_N)
    return h_TF


def rotated_qkv(y_TN: Tensor, bias_N: Tensor | None, rope_2TE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the product (T, 3HE) into q, k and v, (T, H, E) each, and apply RoPE to the first two."""
    q_THE, k_THE, v_THE = _RotatedQkv.apply(y_TN, bias_N, rope_2TE, heads)
    return q_THE, k_THE, v_THE


class _FusedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TN: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_TN)
        ctx.has_bias = bias_N is not None
        gate_TF, value_TF = y_TN.chunk(2, dim=-1)
        return F.silu(gate_TF) * value_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor | None]:
        [y_TN] = ctx.saved_tensors
        rows = _token_groups(len(y_TN))  # groups, tokens of a group; then the half, then F
        gate, value, grad = (part.unflatten(0, rows).unsqueeze(2).float() for part in (*y_TN.chunk(2, dim=-1), grad_TF))
        is_gate = torch.arange(2, device=y_TN.device).view(2, 1) == 0
        sigmoid = gate.sigmoid()
        factor = torch.where(is_gate, value * (1 + gate * (1 - sigmoid)), gate)
        return _grad_and_bias_grad((grad * sigmoid * factor).to(y_TN.dtype), ctx.has_bias)


class _RotatedQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_TN: Tensor, bias_N: Tensor | None, rope_2TE: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rope_2TE)
        ctx.has_bias = bias_N is not None
        q_THE, k_THE, v_THE = y_TN.unflatten(1, (3, heads, -1)).unbind(1)
        return apply_rope(q_THE, rope_2TE), apply_rope(k_THE, rope_2TE), v_THE

    @staticmethod
    def backward(
        ctx: Any, q_grad_THE: Tensor, k_grad_THE: Tensor, v_grad_THE: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        [rope_2TE] = ctx.saved_tensors
        rows, halves = _token_groups(len(q_grad_THE)), (2, q_grad_THE.shape[-1] // 2)
        grad = torch.stack((q_grad_THE, k_grad_THE, v_grad_THE), dim=1)
        grad = grad.unflatten(0, rows).unflatten(-1, halves)  # groups, tokens of a group, part, H, half, E/2
        cos, sin = rope_2TE.unflatten(1, rows).unflatten(-1, halves)[:, :, :, None, None].unbind()
        is_first = torch.arange(2, device=grad.device).view(2, 1) == 0
        is_value = torch.arange(3, device=grad.device).view(3, 1, 1, 1) == 2
        rotated = grad.to(rope_2TE.dtype)
        back = rotated * cos + rotated.flip(-2) * torch.where(is_first, sin, -sin)
        return *_grad_and_bias_grad(torch.where(is_value, grad, back.to(grad.dtype)), ctx.has_bias), None, None


def _token_groups(tokens: int) -> tuple[int, int]:
    """Number of groups and tokens per group: the largest divisor of `tokens` up to BIAS_GROUP."""
    size = max(divisor for divisor in range(1, BIAS_GROUP + 1) if tokens % divisor == 0)
    return tokens // size, size


def _grad_and_bias_grad(grad: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(groups, tokens per group, ...) -> (T, N), and its sum over tokens in the same dtype, if `has_bias`."""
    groups, size = grad.shape[:2]
    columns = grad[0, 0].numel()
    # Not a view: its memory is laid out here, in one piece, before the sum reads it. Inductor would pad the last axis,
    # copy the whole to undo that, and compute it once more for the sum.
    grad_TN = grad.contiguous().as_strided((groups * size, columns), (columns, 1))
    if not has_bias:
        return grad_TN, None
    return grad_TN, grad.sum(1, dtype=torch.float32).sum(0).flatten().to(grad.dtype)
