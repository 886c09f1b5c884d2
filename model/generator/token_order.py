"""In which order tokens are drawn, and how many of them a sample may see in a step of training.

An order is a permutation: order[i] is the place, row by row, of the token drawn i-th. Everywhere in the autoregressive
generators tokens are arranged by it, so that the tokens known so far are a prefix; only at the end they go home.

    order_BN = draw_order("random", uniform_BN)         # [[2, 0, 1], ...] from [[.5, .7, .1], ...]: sorted
    arranged_BNC = arrange(tokens_BNC, order_BN)        # token 2 first
    restore(arranged_BNC, order_BN)                     # tokens_BNC again

The mask ratio is MAR's (arXiv 2406.11838): a normal around 1 with std 0.25, of which [0.7, 1] is kept. Per sample, not
per step: it needs no number that all ranks agree on and no shape that changes, for a sample sees at most
`most_visible` tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from configs.autoregressive import MaskRatio


def draw_order(order: str, uniform_BN: Tensor) -> Tensor:
    """(B, N) int64, a permutation per row: raster's is 0 .. N-1, others are drawn by sorting the uniforms."""
    if order == "raster":
        return torch.arange(uniform_BN.shape[1], device=uniform_BN.device).expand_as(uniform_BN)
    return uniform_BN.argsort(dim=1, stable=True)


def arrange(tokens_BNC: Tensor, order_BN: Tensor) -> Tensor:
    """(B, N, C) row by row -> (B, K, C), the first K of the order, (B, K)."""
    return tokens_BNC.gather(1, order_BN.unsqueeze(-1).expand(-1, -1, tokens_BNC.shape[2]))


def restore(arranged_BNC: Tensor, order_BN: Tensor) -> Tensor:
    """The inverse of `arrange`, of all N."""
    return arrange(arranged_BNC, order_BN.argsort(dim=1))


def mask_ratio(uniform_B: Tensor, ratio: MaskRatio) -> Tensor:
    """(B,) uniforms -> (B,) ratios in [low, 1]: the inverse of the truncated normal's distribution function."""
    least = NormalDist(1.0, ratio.std).cdf(ratio.low)  # of the whole normal; half of it lies below 1
    quantile_B = least + (0.5 - least) * uniform_B.double()
    drawn_B = 1 + ratio.std * torch.special.ndtri(quantile_B)
    return drawn_B.clamp(ratio.low, 1.0)


def mean_mask_ratio(ratio: MaskRatio) -> float:
    """Expectation of `mask_ratio`: 0.867 for MAR's."""
    whole = NormalDist()
    depth = (1 - ratio.low) / ratio.std
    return 1 - ratio.std * (whole.pdf(0) - whole.pdf(depth)) / (whole.cdf(depth) - 0.5)


def most_visible(tokens: int, ratio: MaskRatio) -> int:
    """How many of `tokens` a sample sees at most."""
    return math.floor(tokens * (1 - ratio.low) + 1e-9)  # 10 * (1 - 0.7) is 3, which floats put below


def visible(tokens: int, ratio_B: Tensor, ratio: MaskRatio) -> Tensor:
    """(B,) int64: how many tokens each sample sees, 0 to `most_visible`; ceil(ratio * tokens) are hidden."""
    return (tokens - (ratio_B * tokens).ceil().long()).clamp(0, most_visible(tokens, ratio))


def dealt(visible_B: Tensor, tokens: int, rows: int) -> Tensor:
    """(B, rows) int64: which of the (B * tokens) arranged tokens each row of the head is for.

    A sample's rows go to its hidden tokens in turn, so that each has rows / hidden of them, one more or less:
    dealt([2, 0], tokens=4, rows=5) is [[2, 3, 2, 3, 2], [4, 5, 6, 7, 4]].
    """
    visible_B1 = visible_B.unsqueeze(1)
    turn_R = torch.arange(rows, device=visible_B.device)
    first_B1 = torch.arange(len(visible_B), device=visible_B.device).unsqueeze(1) * tokens
    return first_B1 + visible_B1 + turn_R % (tokens - visible_B1)


def cosine_schedule(tokens: int, iterations: int) -> tuple[int, ...]:
    """How many tokens each iteration draws, tokens in all: few at first, most at the end (MaskGIT, arXiv 2202.04200).

    After iteration i floor(tokens * cos(pi/2 * (i + 1) / iterations)) are still to be drawn, and every iteration draws
    at least one. (16, 4) -> (2, 3, 5, 6).
    """
    left = [tokens]
    for done in range(1, iterations + 1):
        wished = math.floor(tokens * math.cos(math.pi / 2 * done / iterations) + 1e-9)
        left.append(min(left[-1] - 1, max(wished, iterations - done)))
    return tuple(before - after for before, after in pairwise(left))
