"""The transformer between a noisy latent and what is predicted of it: DiT's plan, LightningDiT's parts.

    section = Diffusion(width=768, depth=12, heads=12)
    backbone = Backbone(section, LatentShape(64, 16, 16), num_classes=1000, backend="sdpa")
    backbone(x_BLhw, time_B, labels_B)        # (B, 64, 16, 16) float32; zeros before the first step

Where the variance is learnt too, twice as many channels come out: what it says of it after the noise.

Tokens of `patch` x `patch` latents -> Linear -> (fixed positions) -> blocks under time and class -> norm, modulated ->
Linear, zero at the start. The embedding is outside the blocks, so that what enters the first of them requires a
gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.generator import Diffusion
from model.generator.conditioning import ClassEmbedding, TimeEmbedding, waves
from model.generator.modulated_block import ModulatedBlock, modulated, norm_of
from model.generator.shape import LatentShape
from model.generator.variance import outputs
from model.rope import Rope

ROPE_BASE = 100.0  # coordinates normalised to [-1, 1], as the trunk's (model/rope.py) [D]


class LatentEmbed(nn.Module):
    """A Linear over the numbers of a token."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, width)

    def forward(self, x_TF: Tensor) -> Tensor:
        """(T, numbers) float32 -> (T, width) in the model's dtype."""
        return self.linear(x_TF.to(self.linear.weight.dtype))


class FinalLayer(nn.Module):
    """Norm, shift and scale from the condition, Linear to the numbers of a token."""

    def __init__(self, section: Diffusion, numbers: int) -> None:
        super().__init__()
        self.norm = norm_of(section)
        self.modulation = nn.Linear(section.width, 2 * section.width)
        self.linear = nn.Linear(section.width, numbers)

    def forward(self, x_TD: Tensor, condition_BD: Tensor) -> Tensor:
        """(T, D), (B, D) -> (T, numbers)."""
        shift_BD, scale_BD = self.modulation(F.silu(condition_BD)).chunk(2, dim=1)
        return self.linear(modulated(self.norm(x_TD), shift_BD, scale_BD))


class Backbone(nn.Module):
    """(latents, time, class) -> one number for each of theirs, or two, where it learns the variance."""

    def __init__(self, section: Diffusion, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.grid = section, shape.grid(section.patch)
        numbers = shape.channels * section.patch**2
        self.embed = LatentEmbed(numbers, section.width)
        self.time = TimeEmbedding(section.width)
        self.label = ClassEmbedding(num_classes, section.width)
        self.blocks = nn.ModuleList(ModulatedBlock(section, backend) for _ in range(section.depth))
        self.final = FinalLayer(section, numbers * outputs(section))

    def forward(self, x_BLhw: Tensor, time_B: Tensor, labels_B: Tensor) -> Tensor:
        """(B, L, h, w), (B,), (B,) int64 -> (B, L or 2L, h, w) float32."""
        x_TD, rope_2TE = self._tokens(x_BLhw)
        condition_BD = self.time(time_B, x_TD.dtype) + self.label(labels_B)
        for block in self.blocks:
            x_TD = block(x_TD, condition_BD, rope_2TE)
        count, channels, *sides = x_BLhw.shape
        shape = torch.Size((count, channels * outputs(self.section), *sides))
        return unpatched(self.final(x_TD, condition_BD).float(), shape, self.section.patch)

    def _tokens(self, x_BLhw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, D) tokens, with their positions added or not, and how attention turns them, if it does."""
        count, width, device = x_BLhw.shape[0], self.section.width, x_BLhw.device
        x_TD = self.embed(patched(x_BLhw, self.section.patch))
        if self.section.positions != "rope":
            x_TD = x_TD + grid_waves(self.grid, width, device).to(x_TD.dtype).repeat(count, 1)
        if self.section.positions == "sincos":
            return x_TD, None
        rope = Rope(width // self.section.heads, ROPE_BASE, torch.float32)
        return x_TD, rope.table(self.grid, device).repeat(1, count, 1)


def grid_waves(grid: tuple[int, int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """(N, width) float32: fixed positions, half of the width for a token's row and half for its column."""
    down, across = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    places_N2 = torch.cartesian_prod(down, across)
    return waves(places_N2, width // 2).flatten(1)


def patched(x_BLhw: Tensor, patch: int) -> Tensor:
    """(B, L, h, w) -> (T, L patch patch): tokens row by row, a token's numbers over channel, row, column."""
    count, channels, height, width = x_BLhw.shape
    x = x_BLhw.reshape(count, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch**2)


def unpatched(x_TF: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """The inverse of `patched`."""
    count, channels, height, width = shape
    x = x_TF.reshape(count, height // patch, width // patch, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(shape)
