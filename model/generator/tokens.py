"""Latents as tokens: shape of a latent, patches, and the order in which autoregressive generators draw tokens.

    LatentShape(channels=64, height=16, width=16).grid(patch=2)     # (8, 8) tokens of a 256-pixel image at f16d64

An order is a permutation: order[i] is the position, row by row, of the token drawn i-th. The autoregressive generators
keep tokens permuted by it, so that the known tokens are a prefix, and undo the permutation only at the end.

    order_BN = sample_order("random", uniform_BN)           # [[2, 0, 1], ...] from [[.5, .7, .1], ...]: sorted
    permuted_BNC = permute_tokens(tokens_BNC, order_BN)     # token 2 first
    unpermute_tokens(permuted_BNC, order_BN)                # tokens_BNC again

The mask ratio is MAR's (arXiv 2406.11838): a normal around 1 with std 0.25, truncated to [0.7, 1]. It is drawn per
sample, not per step: ranks need not agree on a number and shapes do not change, since a sample sees at most
`max_visible` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from configs import UserError
from configs.generator import MaskRatio


@dataclass(frozen=True)
class LatentShape:
    """Shape of one image's latent: channels, rows and columns."""

    channels: int
    height: int
    width: int

    @property
    def numel(self) -> int:
        """Numbers in one latent."""
        return self.channels * self.height * self.width

    def grid(self, patch: int) -> tuple[int, int]:
        """(rows, columns) of tokens of `patch` x `patch` latents. Raises UserError unless `patch` divides the sides."""
        if self.height % patch or self.width % patch:
            raise UserError(
                f"generator.patch={patch} does not divide latents of {self.height}x{self.width}: a token holds a whole "
                "square of them; change generator.patch"
            )
        return self.height // patch, self.width // patch


def patchify(x_BLhw: Tensor, patch: int) -> Tensor:
    """Cut latents into tokens row by row: (B, L, h, w) -> (T, L patch patch), in the order channel, row, column."""
    count, channels, height, width = x_BLhw.shape
    x = x_BLhw.reshape(count, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch**2)


def unpatchify(x_TF: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    count, channels, height, width = shape
    x = x_TF.reshape(count, height // patch, width // patch, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def sample_order(order: str, uniform_BN: Tensor) -> Tensor:
    """Draw orders (B, N) int64, one permutation a row: 0 .. N-1 for raster, else random, by sorting the uniforms."""
    if order == "raster":
        return torch.arange(uniform_BN.shape[1], device=uniform_BN.device).expand_as(uniform_BN)
    return uniform_BN.argsort(dim=1, stable=True)


def permute_tokens(tokens_BNC: Tensor, order_BN: Tensor) -> Tensor:
    """Permute tokens (B, N, C) into an order (B, K), which may be its first K only: (B, K, C)."""
    return tokens_BNC.gather(1, order_BN.unsqueeze(-1).expand(-1, -1, tokens_BNC.shape[2]))


def unpermute_tokens(arranged_BNC: Tensor, order_BN: Tensor) -> Tensor:
    """The inverse of `permute_tokens`, for all N tokens."""
    return permute_tokens(arranged_BNC, order_BN.argsort(dim=1))


def sample_mask_ratio(uniform_B: Tensor, ratio: MaskRatio) -> Tensor:
    """Map uniforms (B,) to ratios (B,) in [low, 1], by the inverse distribution function of the truncated normal."""
    least = NormalDist(1.0, ratio.std).cdf(ratio.low)  # of the whole normal, half of which lies below 1
    quantile_B = least + (0.5 - least) * uniform_B.double()
    drawn_B = 1 + ratio.std * torch.special.ndtri(quantile_B)
    return drawn_B.clamp(ratio.low, 1.0)


def mean_mask_ratio(ratio: MaskRatio) -> float:
    """Expectation of `sample_mask_ratio`: 0.867 with MAR's settings."""
    whole = NormalDist()
    depth = (1 - ratio.low) / ratio.std
    return 1 - ratio.std * (whole.pdf(0) - whole.pdf(depth)) / (whole.cdf(depth) - 0.5)


def max_visible(tokens: int, ratio: MaskRatio) -> int:
    """The largest number of tokens that a sample sees."""
    return math.floor(tokens * (1 - ratio.low) + 1e-9)  # 10 * (1 - 0.7) is 3, which floats put below


def num_visible(tokens: int, ratio_B: Tensor, ratio: MaskRatio) -> Tensor:
    """(B,) int64: number of tokens that each sample sees, 0 to `max_visible`; ceil(ratio * tokens) are hidden."""
    return (tokens - (ratio_B * tokens).ceil().long()).clamp(0, max_visible(tokens, ratio))


def assign_head_rows(visible_B: Tensor, tokens: int, rows: int) -> Tensor:
    """(B, rows) int64: index, among the (B * tokens) permuted tokens, of the token of each row of the head.

    A sample's rows go to its hidden tokens in turn, so that each has rows / hidden of them, one more or less:
    assign_head_rows([2, 0], tokens=4, rows=5) is [[2, 3, 2, 3, 2], [4, 5, 6, 7, 4]].
    """
    visible_B1 = visible_B.unsqueeze(1)
    turn_R = torch.arange(rows, device=visible_B.device)
    first_B1 = torch.arange(len(visible_B), device=visible_B.device).unsqueeze(1) * tokens
    return first_B1 + visible_B1 + turn_R % (tokens - visible_B1)


def cosine_schedule(tokens: int, iterations: int) -> tuple[int, ...]:
    """Number of tokens that each iteration draws: few at first, most at the end (MaskGIT, arXiv 2202.04200).

    After iteration i floor(tokens * cos(pi/2 * (i + 1) / iterations)) are still to be drawn, and every iteration draws
    at least one. (16, 4) -> (2, 3, 5, 6).
    """
    left = [tokens]
    for done in range(1, iterations + 1):
        wished = math.floor(tokens * math.cos(math.pi / 2 * done / iterations) + 1e-9)
        left.append(min(left[-1] - 1, max(wished, iterations - done)))
    return tuple(before - after for before, after in pairwise(left))
