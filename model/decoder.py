"""The pixel decoder: latents back to pixels, through blocks of the trunk's kind.

    decoder = PixelDecoder(config.model, backend="sdpa")
    decoder(latent_RPL, grid=(16, 16))      # (R, 256, 64) -> (R, 3, 256, 256) in ImageNet-normalised space

1x1 convolution in, blocks with RoPE and no CLS, norm, 1x1 convolution to 3*p*p numbers a patch, PixelShuffle
[C].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.architecture import Model
from model.block import Block, norm
from model.pack import Group, Layout
from model.rope import rope_of


class PixelDecoder(nn.Module):
    """The convolutions are 1x1, hence linear layers over patches."""

    def __init__(self, model: Model, backend: str) -> None:
        super().__init__()
        vit = model.decoder
        self.patch_size = model.patch_size
        self.rope = rope_of(model, vit)
        self.proj_in = nn.Linear(model.latent_channels, vit.width)
        self.blocks = nn.ModuleList(Block(vit, backend) for _ in range(vit.depth))
        self.norm = norm(vit)
        self.proj_out = nn.Linear(vit.width, 3 * model.patch_size**2)

    def forward(self, latent_RPL: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, P, L), patches row by row over `grid` (down, across) -> (R, 3, height, width), normalised."""
        count, patches = latent_RPL.shape[:2]
        layout = Layout((Group("rec", count, patches, grid),), pad=0)
        rope_2TE = self.rope.packed(layout, latent_RPL.device)
        x_TD = self.proj_in(latent_RPL.flatten(0, 1))
        for block in self.blocks:
            x_TD = block(x_TD, rope_2TE, layout.segments)
        return _shuffle(self.proj_out(self.norm(x_TD)), count, grid, self.patch_size)


def _shuffle(x_TF: Tensor, count: int, grid: tuple[int, int], size: int) -> Tensor:
    """(R*P, 3*size*size) -> (R, 3, height, width); a patch's numbers run over channel, row, column."""
    x = x_TF.reshape(count, *grid, 3, size, size)
    return torch.permute(x, (0, 3, 1, 4, 2, 5)).reshape(count, 3, grid[0] * size, grid[1] * size)
