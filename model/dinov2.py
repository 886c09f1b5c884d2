"""DINOv2's encoder (arXiv 2304.07193), frozen: what VA-VAE aligns its latents with.

    encoder = Dinov2(Vit(width=1024, depth=24, heads=16), patch_size=14, registers=0, places=37 * 37, attention="sdpa")
    encoder(images, grid=(16, 16)).shape        # (R, 256, 1024) float32: its final-normed patch tokens

Its blocks are older than ours: LayerNorm, GELU, a factor for every channel, and learnt positions, added once, which are
resized to the grid at hand. Pictures are resized so that one patch stands where one latent does: those of 256 pixels to
224, for latents of 16 x 16. Files: model/dinov2_file.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.architecture import Vit
from kernels.dense_attention import Segments
from model.block import Attention, LayerNorm, LayerScale
from model.trunk import PatchEmbed

PLACES = 37 * 37  # of the published models, which saw 518 pixels last
MLP_RATIO = 4


class Dinov2Mlp(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), each token by itself."""
        return self.fc2(F.gelu(self.fc1(x_TD)))


class Dinov2Block(nn.Module):
    """x + ls1(attention(norm1(x))), then x + ls2(mlp(norm2(x))); one graph where it is compiled."""

    def __init__(self, vit: Vit, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(vit.width), LayerNorm(vit.width)
        self.attn, self.mlp = Attention(vit, attention), Dinov2Mlp(vit.width)
        self.ls1, self.ls2 = LayerScale(vit.width, 1.0), LayerScale(vit.width, 1.0)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = x_TD + self.ls1(self.attn(self.norm1(x_TD), None, segments))
        return x_TD + self.ls2(self.mlp(self.norm2(x_TD)))


class Dinov2(nn.Module):
    """`places` is the number of learnt positions, a square. Build it outside DeepSpeed's `zero.Init`."""

    def __init__(self, vit: Vit, patch_size: int, registers: int, places: int, attention: str) -> None:
        super().__init__()
        self.patch_size, self.side = patch_size, math.isqrt(places)
        self.patch_embed = PatchEmbed(vit.width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, vit.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + places, vit.width))  # of CLS, then of patches row by row
        self.blocks = nn.ModuleList(Dinov2Block(vit, attention) for _ in range(vit.depth))
        self.norm = LayerNorm(vit.width)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, 3, H, W) ImageNet-normalised -> (R, P, W) float32 over `grid`."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        [patches_RPD] = self.patch_embed(images)
        first_RKD = torch.cat((self.cls_token + self.pos_embed[:, :1], self.register_tokens), dim=1)
        x_RND = torch.cat((first_RKD.expand(len(images), -1, -1), patches_RPD + self._places(grid)), dim=1)
        x_TD, segments = x_RND.flatten(0, 1), (x_RND.shape[:2],)
        for block in self.blocks:
            x_TD = block(x_TD, segments)
        return self.norm(x_TD).view(x_RND.shape)[:, first_RKD.shape[1] :].float()

    def _places(self, grid: tuple[int, int]) -> Tensor:
        """(1, P, D): the positions of patches, resized bicubically, with registers antialiased [C]."""
        learnt_1PD = self.pos_embed[:, 1:]
        if grid == (self.side, self.side):
            return learnt_1PD
        learnt_1Dhw = learnt_1PD.float().transpose(1, 2).unflatten(2, (self.side, self.side))
        is_smooth = self.register_tokens.shape[1] > 0
        resized_1Dhw = F.interpolate(learnt_1Dhw, grid, mode="bicubic", align_corners=False, antialias=is_smooth)
        return resized_1Dhw.flatten(2).transpose(1, 2).to(learnt_1PD.dtype)
