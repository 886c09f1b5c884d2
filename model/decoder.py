"""The pixel decoder: latents back to pixels, through blocks of the trunk's kind.

    decoder = PixelDecoder(config.model, backend="sdpa")
    decoder(latent_RPL, grid=(16, 16))      # (R, 256, 64) -> (R, 3, 256, 256) in ImageNet-normalised space

1x1 convolution in, blocks with RoPE and no CLS, norm, 1x1 convolution to 3*p*p numbers a patch, PixelShuffle
[C].

With patches hidden from the encoder (objectives.rec.mask) there are latents of the others alone, and a learned token
stands in for the rest. It serves training only: no weights that are loaded to be used have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.architecture import Model
from model.block import Block, norm
from model.pack import Group, Layout
from model.rope import rope_of


class PixelDecoder(nn.Module):
    """The convolutions are 1x1, hence linear layers over patches."""

    def __init__(self, model: Model, backend: str, fills_in: bool = False) -> None:
        super().__init__()
        vit = model.decoder
        self.patch_size = model.patch_size
        self.rope = rope_of(model, vit)
        self.proj_in = nn.Linear(model.latent_channels, vit.width)
        self.mask_token = nn.Parameter(torch.empty(1, vit.width)) if fills_in else None
        self.blocks = nn.ModuleList(Block(vit, backend) for _ in range(vit.depth))
        self.norm = norm(vit)
        self.proj_out = nn.Linear(vit.width, 3 * model.patch_size**2)

    def forward(self, latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None = None) -> Tensor:
        """(R, V, L) -> (R, 3, height, width), normalised.

        Latents are of the patches of `grid` (down, across), row by row: of all, or of those in `visible_idx_RV`.
        """
        return self.pixels(self.tokens(latent_RVL, grid, visible_idx_RV), grid)

    def tokens(self, latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None = None) -> Tensor:
        """As `forward`, to what the last layer reads: (R*P, D), normed."""
        count, patches = latent_RVL.shape[0], grid[0] * grid[1]
        layout = Layout((Group("rec", count, patches, grid),), pad=0)
        rope_2TE = self.rope.packed(layout, latent_RVL.device)
        x_TD = self.proj_in(latent_RVL.flatten(0, 1))
        if visible_idx_RV is not None:
            x_TD = self._filled_in(x_TD.unflatten(0, (count, -1)), visible_idx_RV, patches).flatten(0, 1)
        for block in self.blocks:
            x_TD = block(x_TD, rope_2TE, layout.segments)
        normed_TD: Tensor = self.norm(x_TD)
        return normed_TD

    def pixels(self, x_TD: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R*P, D) of `tokens` -> (R, 3, height, width): the last layer, a linear one, and a change of places."""
        return _shuffle(self.proj_out(x_TD), x_TD.shape[0] // (grid[0] * grid[1]), grid, self.patch_size)

    def _filled_in(self, x_RVD: Tensor, visible_idx_RV: Tensor, patches: int) -> Tensor:
        """(R, V, D) -> (R, P, D): the token where nothing is visible."""
        assert self.mask_token is not None, "built with objectives.rec.mask"
        token_RPD = self.mask_token.to(x_RVD.dtype).expand(len(x_RVD), patches, -1)
        return token_RPD.scatter(1, visible_idx_RV.unsqueeze(-1).expand_as(x_RVD), x_RVD)


def _shuffle(x_TF: Tensor, count: int, grid: tuple[int, int], size: int) -> Tensor:
    """(R*P, 3*size*size) -> (R, 3, height, width); a patch's numbers run over channel, row, column."""
    x_RFhw = x_TF.reshape(count, *grid, -1).permute(0, 3, 1, 2)
    return F.pixel_shuffle(x_RFhw, size).contiguous()  # on CPU it keeps the input's memory format
