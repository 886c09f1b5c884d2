"""PatchGAN: one number for every overlapping patch of a picture, high where the patch looks real (arXiv 1611.07004).

    disc = PatchGan(Discriminator(width=64, layers=3))
    disc(pictures_BCHW)           # (B, 3, 256, 256) in [-1, 1] -> (B, 1, 30, 30) logits, each of a 70 x 70 patch

4x4 convolutions, of stride 2 but for the last two, and leaky ReLU. Between them the layers are normed in groups of 16
channels of one picture. Batch norm, as published, would tie a picture's logits to its neighbours in the batch: 1 rank
and 2 would train different discriminators, real and fake pictures could not share a pass, and running means are buffers
that ZeRO neither partitions nor reduces, and that no checkpoint piece holds. Here there are none.

No module is a ZeRO-3 leaf: a step runs this network twice, once for the decoder's term and once for its own, and a leaf
may run once.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoder_gan import Discriminator
from model.initialise import generator_of

GROUP_CHANNELS = 16  # channels normed together; of 512 channels 32 groups, as elsewhere in the field
SLOPE = 0.2  # of the leaky ReLU below zero
EPS = 1e-6


class GroupNorm(nn.Module):
    """Zero mean and unit variance over 16 channels of one picture, then a scale and a shift per channel; float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.groups = channels // GROUP_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape and dtype."""
        return F.group_norm(x.float(), self.groups, self.weight.float(), self.bias.float(), EPS).to(x.dtype)


class PatchGan(nn.Module):
    """Channels double with every layer, up to 8 times the first's; the last convolution gives one."""

    def __init__(self, config: Discriminator) -> None:
        super().__init__()
        channels = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        strides = [2] * (config.layers - 1) + [1]
        self.first = nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(given, made, kernel_size=4, stride=stride, padding=1, bias=False)  # the norm shifts
            for (given, made), stride in zip(itertools.pairwise(channels), strides, strict=True)
        )
        self.norms = nn.ModuleList(GroupNorm(made) for made in channels[1:])
        self.last = nn.Conv2d(channels[-1], 1, kernel_size=4, stride=1, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) from -1, black, to 1, white -> (B, 1, h, w) float32 logits, h = H / 2^layers - 2."""
        x = F.leaky_relu(self.first(pictures.to(self.first.weight.dtype)), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        logits: Tensor = self.last(x).float()
        return logits


@torch.no_grad()
def initialise_discriminator(name: str, tensor: Tensor, seed: int) -> None:
    """Fills `tensor`, the whole parameter `name` of a PatchGan, from the seed and the name alone.

    Convolutions normal 0.02 (pix2pix), biases 0, norms 1.
    """
    if tensor.dim() == 1:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    tensor.copy_(drawn.normal_(0.0, 0.02, generator=generator_of(seed, f"discriminator.{name}")))
