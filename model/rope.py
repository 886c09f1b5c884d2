"""Axial rotary position embedding (RoPE): half of the angles encode a patch's row, half its column.

Coordinates are patch centres normalised to [-1, 1] on each axis, so a crop of any size or shape covers the
same range. CLS, registers and padding are not rotated: their rows of the table are cos 1, sin 0.

    rope = Rope(head_width=8, base=100.0, dtype=torch.float32)
    rope.periods()                  # (2,): 1, 10               base^(i / (E/4)) for i = 0 .. E/4 - 1
    rope.table((2, 3))              # (2, 6, 8) cos and sin of 6 patches: 2 row angles, 2 column angles, again
    rope.packed(layout, device)     # (2, T, 8) for all tokens of a step
    apply_rope(q_THE, rope_2TE)           # q cos + rotate_half(q) sin
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import Model, Vit
from model.packing import PackedLayout

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Rope:
    """Rotary tables of one head width. `dtype` is that of the periods and all later values; bf16 in the released
    weights [C]."""

    head_width: int  # a multiple of 4: two axes, and cos/sin pairs
    base: float
    dtype: torch.dtype

    def periods(self, device: torch.device | str = "cpu") -> Tensor:
        """(E/4,) periods, in units of the normalised coordinate.

        Exponents are rounded to `dtype` too, as in the released weights [C]; it matters where E is no power of two.
        """
        exponents = torch.arange(self.head_width // 4, device=device, dtype=self.dtype) / (self.head_width // 4)
        periods: Tensor = self.base**exponents
        return periods

    def table(self, grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """(2, P, E): cos and sin for the patches of a (rows, columns) grid, row by row."""
        down, across = ((torch.arange(0.5, size, device=device, dtype=self.dtype) / size) * 2 - 1 for size in grid)
        centres_P2 = torch.cartesian_prod(down, across)
        angles_P2Q = 2 * math.pi * centres_P2[:, :, None] / self.periods(device)
        angles_PE = angles_P2Q.flatten(1).repeat(1, 2)
        return torch.stack((angles_PE.cos(), angles_PE.sin()))

    def packed(
        self, layout: PackedLayout, device: torch.device | str, visible: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """(2, T, E): the table of every token of `layout`; identity rows for CLS, registers and padding.

        `visible` holds, for groups with hidden patches, the indices of the visible ones: (segments, V).
        """
        parts = []
        for group in layout.groups:
            prefix_2NE, table_2PE = self._identity(group.prefix, device), self.table(group.grid, device)
            if visible is not None and group.name in visible:
                prefix_2SNE = prefix_2NE.unsqueeze(1).expand(-1, group.segments, -1, -1)
                parts.append(torch.cat((prefix_2SNE, table_2PE[:, visible[group.name]]), dim=2).flatten(1, 2))
            else:
                parts.append(torch.cat((prefix_2NE, table_2PE), dim=1).repeat(1, group.segments, 1))
        return torch.cat((*parts, self._identity(layout.pad, device)), dim=1)

    def _identity(self, tokens: int, device: torch.device | str) -> Tensor:
        cos_1NE = torch.ones(1, tokens, self.head_width, device=device, dtype=self.dtype)
        return torch.cat((cos_1NE, torch.zeros_like(cos_1NE)))


def build_rope(model: Model, vit: Vit) -> Rope:
    """Build the RoPE of `vit`, the trunk or the decoder of `model`."""
    return Rope(vit.width // vit.heads, model.rope_base, _DTYPES[model.rope_dtype])


def apply_rope(x_THE: Tensor, rope_2TE: Tensor) -> Tensor:
    """Rotate every pair (x_i, x_{i + E/2}) of every head by its token's angle, in the table's dtype.

    With a bf16 table even float32 queries and keys are rounded to bf16 here: the released weights were
    trained so, and only so do their outputs agree to 1e-4.
    """
    cos_T1Q, sin_T1Q = rope_2TE.chunk(2, dim=-1)[0].unsqueeze(2)  # the table has every angle twice
    first, second = x_THE.to(rope_2TE.dtype).chunk(2, dim=-1)
    rotated_THE = torch.cat((first * cos_T1Q - second * sin_T1Q, second * cos_T1Q + first * sin_T1Q), dim=-1)
    # Not a cast to the same dtype: it gives the same tensor, and torch 2.11 loses the gradient of a compiled autograd
    # function's result that is also one of its intermediates (model/block.py).
    return rotated_THE if rotated_THE.dtype == x_THE.dtype else rotated_THE.to(x_THE.dtype)
