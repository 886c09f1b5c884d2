"""Which tokens are read behind the trunk: the last MLP computes no others.

Attention lets every token of a crop act on every other, an MLP does not: behind the last attention a patch that no
objective looks at changes nothing. Of the 14,704 tokens of a VTP-S step (32 clip, 8 ssl with 2 + 8 crops, 4 rec) 1,754
are read: the CLS of every crop, the hidden patches of the ssl crops, the patches to reconstruct. Values and gradients
of what is read are the same, exactly.

    reads = reads_of([layout.cls(tokens(layout), "clip"), ...])
    x_TD = trunk(crops, masks, reads=reads)          # rows that are not read come out unfinished
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pack import ALIGN, Layout


class Reads(NamedTuple):
    """Distinct tokens, `used` of them; behind them token 0 fills up to a multiple of 16, as FP8 products want."""

    idx_N: Tensor
    used: int

    def add(self, x_TD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x) where it is read, x elsewhere: (T, D) -> (T, D)."""
        y_ND = branch(x_TD.index_select(0, self.idx_N))
        return x_TD.index_add(0, self.idx_N[: self.used], y_ND[: self.used])


def tokens(layout: Layout, device: torch.device) -> Tensor:
    """(T, 1): every token's number, to be selected from as its features will be."""
    return torch.arange(layout.tokens, device=device).unsqueeze(1)


def reads_of(parts: Sequence[Tensor]) -> Reads:
    """The token numbers in `parts`, each of which any one part may hold, once: (..., 1) each."""
    idx_N = torch.cat([part.flatten() for part in parts])
    return Reads(F.pad(idx_N, (0, -len(idx_N) % ALIGN)), len(idx_N))


def masked_patches(x_TD: Tensor, layout: Layout, masked_idx: Tensor) -> Tensor:
    """(M, D): the patches of the global crops at flat positions `masked_idx` of (G, P)."""
    return layout.patches(x_TD, "ssl_global").flatten(0, 1).index_select(0, masked_idx)
