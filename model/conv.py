"""Convolutional encoder and decoder of latent diffusion (arXiv 2112.10752), instead of trunk and decoder: `model.conv`.

    encoder = ConvEncoder(config.model, backend="sdpa")     # multipliers 1 1 2 2 4 of 128 channels: patch size 16
    x_TD = encoder({"clip": pixels}, {})                    # (8, 3, 256, 256) -> (8 * 256, D)
    decoder = ConvDecoder(config.model, backend="sdpa")
    decoder(latent_RPL, grid=(16, 16))                      # (R, 256, L) -> (R, 3, 256, 256)

    encoder   3x3 convolution; per level residual blocks, on the coarsest `attention_levels` with attention over all
              positions behind each, then half the resolution; in the middle a residual block, attention, a residual
              block; norm, SiLU, 3x3 convolution to D, which is L, and 2L with Gaussian latents
    decoder   1x1 convolution, 3x3 convolution, the same middle, levels upwards with one residual block more each

They have the interfaces of Trunk and PixelDecoder, so everything between them (bottleneck, losses, tokenizer) is
unchanged; they lack CLS, several sizes of crops and hidden patches, and the schema refuses objectives that need these.
The bottleneck behind the encoder is latent diffusion's `quant_conv`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Conv, Model
from kernels.attention import attend
from model.latent import feature_width
from model.packing import PackedLayout, TokenSubset, packed_layout

EPS = 1e-6  # of all norms [C of latent diffusion]


class ResBlock(nn.Module):
    """x + two times (norm, SiLU, 3x3 convolution); the shortcut is a 1x1 convolution where the channels change."""

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, h, w) -> (B, channels, h, w)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        y = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(y)))


class PositionAttention(nn.Module):
    """x + self-attention over the positions of an image; one head, no position embedding."""

    def __init__(self, channels: int, groups: int, backend: str) -> None:
        super().__init__()
        # The head is as wide as the level, wider than the libraries' kernels allow: torch's own serves for all
        # backends.
        self.backend = backend if backend == "matmul" else "sdpa"
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        count, channels, height, width = x.shape
        q_THE, k_THE, v_THE = self.qkv(_tokens(self.norm(x))).unflatten(1, (3, 1, channels)).unbind(1)
        y_TC = self.proj(attend(q_THE, k_THE, v_THE, ((count, height * width),), backend=self.backend).flatten(1))
        return x + _pixels(y_TC, count, (height, width))


class Downsample(nn.Module):
    """Halve the resolution: a 3x3 convolution of stride 2, padded below and on the right [C of latent diffusion]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest-neighbour upsampling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResolutionLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention if a backend is given, then the resolution change
    `step`, if any."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        num_blocks: int,
        groups: int,
        step: nn.Module | None,
        attention: str | None,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(width, channels, groups) for width in widths)
        self.attns = nn.ModuleList(
            nn.Identity() if attention is None else PositionAttention(channels, groups, attention) for _ in widths
        )
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, h, w) -> (B, channels, h, w), halved or doubled by the step."""
        for block, attn in zip(self.blocks, self.attns, strict=True):
            x = attn(block(x))
        return x if self.step is None else self.step(x)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, conv: Conv, backend: str) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, conv.groups)
        self.attn = PositionAttention(channels, conv.groups, backend)
        self.block2 = ResBlock(channels, channels, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block2(self.attn(self.block1(x)))


class ConvEncoder(nn.Module):
    """Convolutional encoder with the interface of Trunk, `layout` and `forward`, for one size of crops."""

    def __init__(self, model: Model, backend: str) -> None:
        super().__init__()
        conv, self.patch_size = conv_section(model), model.patch_size
        widths = level_channels(conv)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            ResolutionLevel(
                before,
                width,
                conv.num_res_blocks,
                conv.groups,
                step=Downsample(width) if depth < len(widths) else None,
                attention=backend if depth > len(widths) - conv.attention_levels else None,
            )
            for depth, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False), 1)
        )
        self.middle = MiddleBlock(widths[-1], conv, backend)
        self.norm = nn.GroupNorm(conv.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], feature_width(model), 3, padding=1)

    def layout(self, crops: Mapping[str, Tensor], visible: Mapping[str, Tensor] | None = None) -> PackedLayout:
        """The packed layout of `crops`: positions only, no CLS and no padding."""
        assert not visible, "the schema refuses objectives.rec.mask: a convolution sees whole images"
        sizes = {name: (pixels.shape[0], pixels.shape[2], pixels.shape[3]) for name, pixels in crops.items()}
        return packed_layout(sizes, self.patch_size, prefix=0, align=1)

    def forward(
        self,
        crops: dict[str, Tensor],
        masks: dict[str, Tensor],
        *,
        kept_idx: Tensor | None = None,
        read_tokens: TokenSubset | None = None,
        visible: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return (T, D) features in the order of `layout(crops)`. `read_tokens` is ignored, the others refused."""
        assert not masks, "the schema refuses objectives.ssl"
        assert kept_idx is None, "the schema refuses model.trunk"
        assert not visible, "the schema refuses objectives.rec.mask"
        [pixels] = crops.values()
        x = self.conv_in(pixels.to(self.conv_in.weight.dtype))
        for level in self.levels:
            x = level(x)
        return _tokens(self.conv_out(F.silu(self.norm(self.middle(x)))))


class ConvDecoder(nn.Module):
    """Convolutional decoder with the interface of PixelDecoder."""

    def __init__(self, model: Model, backend: str) -> None:
        super().__init__()
        conv = conv_section(model)
        widths = level_channels(conv)[::-1]
        self.proj_in = nn.Linear(model.latent_channels, model.latent_channels)
        self.conv_in = nn.Conv2d(model.latent_channels, widths[0], 3, padding=1)
        self.middle = MiddleBlock(widths[0], conv, backend)
        self.levels = nn.ModuleList(
            ResolutionLevel(
                before,
                width,
                conv.num_res_blocks + 1,
                conv.groups,
                step=Upsample(width) if depth < len(widths) else None,
                attention=backend if depth <= conv.attention_levels else None,
            )
            for depth, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False), 1)
        )
        self.norm = nn.GroupNorm(conv.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent_RPL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None = None) -> Tensor:
        """(R, P, L), positions row by row over `grid` (down, across) -> (R, 3, height, width), normalised."""
        assert visible_idx_RV is None, "the schema refuses objectives.rec.mask"
        count = latent_RPL.shape[0]
        x = self.middle(self.conv_in(_pixels(self.proj_in(latent_RPL.flatten(0, 1)), count, grid)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm(x)))


def conv_section(model: Model) -> Conv:
    """Return model.conv, which must be set."""
    assert model.conv is not None, "built where model.conv is set"
    return model.conv


def level_channels(conv: Conv) -> list[int]:
    """Channels of every level, from the highest resolution down."""
    return [conv.channels * multiplier for multiplier in conv.multipliers]


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B*h*w, C), positions row by row."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1)


def _pixels(x_TC: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `_tokens`."""
    return x_TC.unflatten(0, (count, -1)).transpose(1, 2).unflatten(2, grid)
