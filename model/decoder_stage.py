"""Stage 2's model: a trained tokenizer of which the decoder alone goes on learning.

    stage = DecoderStage(model, attention="sdpa")
    outputs = stage(images)                 # (R, 3, 256, 256) uint8 -> reconstructions in ImageNet-normalised space

Parameters have the Pretrainer's names. Encoder and bottleneck are frozen and run without gradient; stochastic depth is
off, as it always is without a draw, and of a Gaussian latent the mode is decoded. They live in the same engine as the
decoder, so that ZeRO-3 partitions them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.architecture import Model
from model.decoder import PixelDecoder
from model.imagenet import normalise
from model.latent import bottleneck, mode
from model.trunk import Trunk


@dataclass(frozen=True)
class StageOutputs:
    """One forward pass: R pictures of P patches, P*R = T tokens."""

    recon: Tensor  # (R, 3, H, W) float32, ImageNet-normalised
    target: Tensor  # (R, 3, H, W) float32, ImageNet-normalised
    latent: Tensor  # (R, L, h, w) what the decoder read
    tokens_TD: Tensor  # (T, D) what the decoder's last layer read; no gradient


class DecoderStage(nn.Module):
    """`attention` is the name of a resolved backend (kernels.attention.resolve)."""

    def __init__(self, model: Model, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.trunk = Trunk(model, attention).requires_grad_(False)
        self.bottleneck = bottleneck(model).requires_grad_(False)
        self.decoder = PixelDecoder(model, attention)

    def forward(self, images: Tensor) -> StageOutputs:
        """(R, 3, H, W), uint8 or float in [0, 1]."""
        crops = {"clip": normalise(images)}
        layout = self.trunk.layout(crops)
        with torch.no_grad():
            latent_RPL = mode(self.bottleneck(layout.patches(self.trunk(crops, {}), "clip")), self.model)
        grid = layout.group("clip").grid
        tokens_TD = self.decoder.tokens(latent_RPL, grid)
        return StageOutputs(
            recon=self.decoder.pixels(tokens_TD, grid).float(),
            target=crops["clip"],
            latent=latent_RPL.transpose(1, 2).unflatten(2, grid),
            tokens_TD=tokens_TD.detach(),
        )
