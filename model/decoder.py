"""The pixel decoder, and stage 2's model around it: a trained tokenizer whose decoder alone is trained further.

    decoder = PixelDecoder(config.model, backend="sdpa")
    decoder(latent_RPL, grid=(16, 16))      # (R, 256, 64) -> (R, 3, 256, 256), ImageNet-normalised

1x1 convolution in, transformer blocks with RoPE and without CLS, norm, 1x1 convolution to 3*p*p numbers a patch,
PixelShuffle [C]. Where patches are hidden from the encoder (objectives.rec.mask), a learned token replaces their
latents. It serves training only: weights that are loaded for use do not have it.

    stage = DecoderStage(model, attention="sdpa")
    outputs = stage(images)                 # (R, 3, 256, 256) uint8 -> reconstructions, ImageNet-normalised
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Model
from model.block import Block, build_norm
from model.imagenet import normalise
from model.latent import build_bottleneck, mode
from model.packing import CropGroup, PackedLayout
from model.rope import build_rope
from model.trunk import Trunk


class PixelDecoder(nn.Module):
    """Transformer from latents to pixels. Its 1x1 convolutions are linear layers over patches."""

    def __init__(self, model: Model, backend: str, has_mask_token: bool = False) -> None:
        super().__init__()
        vit = model.decoder
        self.patch_size = model.patch_size
        self.rope = build_rope(model, vit)
        self.proj_in = nn.Linear(model.latent_channels, vit.width)
        self.mask_token = nn.Parameter(torch.empty(1, vit.width)) if has_mask_token else None
        self.blocks = nn.ModuleList(Block(vit, backend) for _ in range(vit.depth))
        self.norm = build_norm(vit)
        self.proj_out = nn.Linear(vit.width, 3 * model.patch_size**2)

    def forward(self, latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None = None) -> Tensor:
        """(R, V, L) -> (R, 3, height, width), normalised.

        Latents belong to the patches of `grid` (down, across), row by row: all, or those in `visible_idx_RV`.
        """
        return self.pixels(self.tokens(latent_RVL, grid, visible_idx_RV), grid)

    def tokens(self, latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None = None) -> Tensor:
        """The input of the last layer, normed: (R*P, D). Arguments as of `forward`."""
        count, patches = latent_RVL.shape[0], grid[0] * grid[1]
        layout = PackedLayout((CropGroup("rec", count, patches, grid),), pad=0)
        rope_2TE = self.rope.packed(layout, latent_RVL.device)
        x_TD = self.proj_in(latent_RVL.flatten(0, 1))
        if visible_idx_RV is not None:
            x_TD = self._with_mask_tokens(x_TD.unflatten(0, (count, -1)), visible_idx_RV, patches).flatten(0, 1)
        for block in self.blocks:
            x_TD = block(x_TD, rope_2TE, layout.segments)
        normed_TD: Tensor = self.norm(x_TD)
        return normed_TD

    def pixels(self, x_TD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Last linear layer and PixelShuffle: (R*P, D) of `tokens` -> (R, 3, height, width)."""
        return _shuffle(self.proj_out(x_TD), x_TD.shape[0] // (grid[0] * grid[1]), grid, self.patch_size)

    def _with_mask_tokens(self, x_RVD: Tensor, visible_idx_RV: Tensor, patches: int) -> Tensor:
        """(R, V, D) -> (R, P, D): the mask token at hidden patches."""
        assert self.mask_token is not None, "built with objectives.rec.mask"
        token_RPD = self.mask_token.to(x_RVD.dtype).expand(len(x_RVD), patches, -1)
        return token_RPD.scatter(1, visible_idx_RV.unsqueeze(-1).expand_as(x_RVD), x_RVD)


def _shuffle(x_TF: Tensor, count: int, grid: tuple[int, int], size: int) -> Tensor:
    """(R*P, 3*size*size) -> (R, 3, height, width); a patch's numbers run over channel, row, column."""
    x_RFhw = x_TF.reshape(count, *grid, -1).permute(0, 3, 1, 2)
    return F.pixel_shuffle(x_RFhw, size).contiguous()  # on CPU it keeps the input's memory format


@dataclass(frozen=True)
class DecoderStageOutputs:
    """One forward pass of DecoderStage: R images of P patches, P*R = T tokens."""

    recon: Tensor  # (R, 3, H, W) float32, ImageNet-normalised
    target: Tensor  # (R, 3, H, W) float32, ImageNet-normalised
    latent: Tensor  # (R, L, h, w) the decoder's input
    tokens_TD: Tensor  # (T, D) the input of the decoder's last layer; no gradient


class DecoderStage(nn.Module):
    """Frozen encoder and bottleneck, trainable decoder; parameters have the Pretrainer's names.

    The frozen modules run without gradient; stochastic depth is off, as always without `kept_idx`, and of a Gaussian
    latent the mode is decoded. They are in the same engine as the decoder, so that ZeRO-3 partitions them too.
    `attention` is the name of a resolved backend (kernels.attention.resolve_attention).
    """

    def __init__(self, model: Model, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.trunk = Trunk(model, attention).requires_grad_(False)
        self.bottleneck = build_bottleneck(model).requires_grad_(False)
        self.decoder = PixelDecoder(model, attention)

    def forward(self, images: Tensor) -> DecoderStageOutputs:
        """(R, 3, H, W), uint8 or float in [0, 1]."""
        crops = {"clip": normalise(images)}
        layout = self.trunk.layout(crops)
        with torch.no_grad():
            latent_RPL = mode(self.bottleneck(layout.patches(self.trunk(crops, {}), "clip")), self.model)
        grid = layout.group("clip").grid
        tokens_TD = self.decoder.tokens(latent_RPL, grid)
        return DecoderStageOutputs(
            recon=self.decoder.pixels(tokens_TD, grid).float(),
            target=crops["clip"],
            latent=latent_RPL.transpose(1, 2).unflatten(2, grid),
            tokens_TD=tokens_TD.detach(),
        )
