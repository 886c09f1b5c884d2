"""The diffusion head: a residual MLP that denoises one token, given the vector the transformer has for its place.

It is small beside the transformer and runs once for every noise level that a token meets: it sees rows, not sequences.
Time and condition, summed, modulate every block (AdaLN) and gate its branch; gates start at 0.

    head = DiffusionHead(Head(width=1024, depth=6), channels=16, condition=768)
    head(noisy_RC, thousandths_R, z_ND, row_idx_R)      # (R, 16) float32; row r is denoised given z_ND[row_idx_R[r]]

One call a step, however many levels a token meets: a block is a leaf of ZeRO-3, and runs once. The condition is
projected before rows repeat it. From MAR (arXiv 2406.11838); the learnt variance of its code is left out: the
paper's loss has none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from configs.autoregressive import Head
from model.block import LayerNorm
from model.generator.conditioning import TimeEmbedding
from model.generator.modulated_block import PlainLayerNorm


class HeadBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), the three from the condition; a leaf of ZeRO-3 and one graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.w1 = nn.Linear(width, width)
        self.w2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x_RW: Tensor, condition_RW: Tensor) -> Tensor:
        """(R, W) rows and their conditions, already through a SiLU -> (R, W)."""
        shift_RW, scale_RW, gate_RW = self.modulation(condition_RW).chunk(3, dim=1)
        inner_RW = self.norm(x_RW) * (1 + scale_RW) + shift_RW
        return x_RW + gate_RW * self.w2(F.silu(self.w1(inner_RW)))


class HeadEnd(nn.Module):
    """Modulated norm, then the prediction; zeros before the first step."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = PlainLayerNorm()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, channels)

    def forward(self, x_RW: Tensor, condition_RW: Tensor) -> Tensor:
        """(R, W) -> (R, C)."""
        shift_RW, scale_RW = self.modulation(condition_RW).chunk(2, dim=1)
        return self.linear(self.norm(x_RW) * (1 + scale_RW) + shift_RW)


class DiffusionHead(nn.Module):
    """(noisy token, time, condition) -> what the objective predicts."""

    def __init__(self, head: Head, channels: int, condition: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, head.width)
        self.time = TimeEmbedding(head.width)
        self.condition = nn.Linear(condition, head.width)
        self.blocks = nn.ModuleList(HeadBlock(head.width) for _ in range(head.depth))
        self.end = HeadEnd(head.width, channels)

    def forward(self, noisy_RC: Tensor, thousandths_R: Tensor, z_ND: Tensor, row_idx_R: Tensor | None = None) -> Tensor:
        """(R, C) float32. `row_idx_R` names each row's condition among z_ND; without it they are row by row."""
        condition_RW = self.condition(z_ND)
        if row_idx_R is not None:
            condition_RW = condition_RW.index_select(0, row_idx_R)
        condition_RW = F.silu(self.time(thousandths_R, z_ND.dtype) + condition_RW)
        x_RW = self.linear(noisy_RC.to(z_ND.dtype))
        for block in self.blocks:
            x_RW = block(x_RW, condition_RW)
        return self.end(x_RW, condition_RW).float()
