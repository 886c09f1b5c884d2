"""Elementwise parts of a block with a backward pass that torch.compile turns into one kernel each on a GPU.

    y_TN, bias_N = product(self.w12, x_TD)      # with the bias added; its gradient is left to what follows
    h_TF = swiglu(y_TN, bias_N)                 # silu(gate) * value
    q_THE, k_THE, v_THE = turned(y_TN, bias_N, rope_2TE, heads)     # queries and keys turned by RoPE

Values and gradients are those of the plain expressions in model/block.py. Inductor generates three faults for those,
seen in its code for sm_90 (`python -m profiling.bench block_kernels`):

    - a bias's gradient, the sum over tokens, is a kernel of its own that reads the whole gradient once more. Here it is
      summed in groups of up to 32 neighbouring tokens, in float32, by the kernel that makes the gradient, and what is
      left to sum is a thirty-second part;
    - a gradient put together from parts (gate and value; q, k and v, each of two halves) is computed for every element
      of every part, and all but one are thrown away. Here the part is an axis, and every element one expression of it;
    - as a result those kernels wait for instructions and not for memory.

In eager mode the plain expressions are as good and are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.rope import turn

GROUP = 32  # tokens at most; Inductor reduces 32 rows of 128 columns in one tile without spilling registers


def is_used(x: Tensor) -> bool:
    """Return whether a block uses this file instead of plain expressions: compiled, on a GPU, with a gradient."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_cuda


def product(layer: nn.Module, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """layer(x), and the bias whose gradient is left to the caller; None where the layer (of FP8) sees to it itself."""
    if type(layer) is not nn.Linear:
        return layer(x_TD), None
    return F.linear(x_TD, layer.weight, layer.bias.detach()), layer.bias


def swiglu(y_TN: Tensor, bias_N: Tensor | None) -> Tensor:
    """silu(gate) * value, gate being the first half of the columns of y and value the second: (T, 2F) -> (T, F)."""
    h_TF: Tensor = _SwiGlu.apply(y_TN, bias_N)
    return h_TF


def turned(y_TN: Tensor, bias_N: Tensor | None, rope_2TE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (T, H, E) each, of the product (T, 3HE), the first two turned as model.rope.turn does it."""
    q_THE, k_THE, v_THE = _Turned.apply(y_TN, bias_N, rope_2TE, heads)
    return q_THE, k_THE, v_THE


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TN: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_TN)
        ctx.has_bias = bias_N is not None
        gate_TF, value_TF = y_TN.chunk(2, dim=-1)
        return F.silu(gate_TF) * value_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor | None]:
        [y_TN] = ctx.saved_tensors
        rows = _grouped(len(y_TN))  # groups, tokens of a group; then the half, then F
        gate, value, grad = (part.unflatten(0, rows).unsqueeze(2).float() for part in (*y_TN.chunk(2, dim=-1), grad_TF))
        is_gate = torch.arange(2, device=y_TN.device).view(2, 1) == 0
        sigmoid = gate.sigmoid()
        factor = torch.where(is_gate, value * (1 + gate * (1 - sigmoid)), gate)
        return _with_bias((grad * sigmoid * factor).to(y_TN.dtype), ctx.has_bias)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_TN: Tensor, bias_N: Tensor | None, rope_2TE: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rope_2TE)
        ctx.has_bias = bias_N is not None
        q_THE, k_THE, v_THE = y_TN.unflatten(1, (3, heads, -1)).unbind(1)
        return turn(q_THE, rope_2TE), turn(k_THE, rope_2TE), v_THE

    @staticmethod
    def backward(
        ctx: Any, q_grad_THE: Tensor, k_grad_THE: Tensor, v_grad_THE: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        [rope_2TE] = ctx.saved_tensors
        rows, halves = _grouped(len(q_grad_THE)), (2, q_grad_THE.shape[-1] // 2)
        grad = torch.stack((q_grad_THE, k_grad_THE, v_grad_THE), dim=1)
        grad = grad.unflatten(0, rows).unflatten(-1, halves)  # groups, tokens of a group, part, H, half, E/2
        cos, sin = rope_2TE.unflatten(1, rows).unflatten(-1, halves)[:, :, :, None, None].unbind()
        is_first = torch.arange(2, device=grad.device).view(2, 1) == 0
        is_value = torch.arange(3, device=grad.device).view(3, 1, 1, 1) == 2
        turning = grad.to(rope_2TE.dtype)
        back = turning * cos + turning.flip(-2) * torch.where(is_first, sin, -sin)
        return *_with_bias(torch.where(is_value, grad, back.to(grad.dtype)), ctx.has_bias), None, None


def _grouped(tokens: int) -> tuple[int, int]:
    """Groups, and tokens of a group: as many as divide all of them, GROUP at most."""
    size = max(divisor for divisor in range(1, GROUP + 1) if tokens % divisor == 0)
    return tokens // size, size


def _with_bias(grad: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(groups, tokens of a group, ...) -> (T, N), and its sum over tokens in the same dtype, if wanted."""
    groups, size = grad.shape[:2]
    columns = grad[0, 0].numel()
    # Not a view: its memory is laid out here, in one piece, before the sum reads it. Inductor would pad the last axis,
    # copy the whole to undo that, and compute it once more for the sum.
    grad_TN = grad.contiguous().as_strided((groups * size, columns), (columns, 1))
    if not has_bias:
        return grad_TN, None
    return grad_TN, grad.sum(1, dtype=torch.float32).sum(0).flatten().to(grad.dtype)
