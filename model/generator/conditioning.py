"""What a block is told beside the tokens: the time and the class, each as a vector, summed.

    condition_BD = TimeEmbedding(768)(time_B) + ClassEmbedding(1000, 768)(labels_B)     # label 1000: no class

The time goes in as it is: 0 to 1 on the straight path, as in SiT and LightningDiT, 0 to 999 with DDPM's steps [C]. With
generator.time_scale=1000 it is 0 to 1000 on both, which short runs learn from faster (docs/decisions/generators.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256  # sines and cosines together [C]
LONGEST = 10_000.0  # slowest wave, in units of the time over 2 pi [C]


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(FREQUENCIES, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, time_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) float32 -> (B, width) in `dtype`."""
        return self.linear2(F.silu(self.linear1(waves(time_B, FREQUENCIES).to(dtype))))


class ClassEmbedding(nn.Module):
    """One row a class, and a last one for no class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        """(B,) int64 in 0 .. num_classes -> (B, width)."""
        return self.table(labels_B)


def waves(position: Tensor, width: int) -> Tensor:
    """(...) -> (..., width) float32: cos, then sin, of the position times width / 2 falling frequencies from 1."""
    exponents = torch.arange(width // 2, device=position.device, dtype=torch.float32) / (width // 2)
    angles = position.float().unsqueeze(-1) * torch.exp(-math.log(LONGEST) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
