"""FLOPs of a convolutional autoencoder, on one image: model/conv.py in numbers.

    conv_encoder(model, size=256).forward       # f16, 128 channels, L = 64 Gaussian: 269e9
    conv_decoder(model, size=256).forward

Conventions are in profiling/flops.py. Held against torch's counter as the rest of the step is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.architecture import Conv, Model
from model.conv import channels_of, conv_of
from model.latent import feature_width
from profiling.flops import attention, convolution, linear


@dataclass(frozen=True)
class ConvFlops:
    """Forward of one tower on one image, and what parts of it matter to backward."""

    forward: float
    edge: float  # the first convolution; of the encoder it is of pixels, which have no gradient
    again: float  # what backward computes a second time of every residual block, were it to keep none of it
    scores: float  # the two products between positions, in the middle and on the levels that attend


@dataclass(frozen=True)
class _Block:
    """A residual block: the way past, and the two convolutions."""

    shortcut: float
    conv1: float
    conv2: float

    @property
    def forward(self) -> float:
        return self.shortcut + self.conv1 + self.conv2


def conv_encoder(model: Model, size: int) -> ConvFlops:
    """On an image of `size` px."""
    widths = channels_of(conv_of(model))
    edge = convolution(size**2, 3, widths[0], 3)
    last = convolution((size // model.patch_size) ** 2, widths[-1], feature_width(model), 3)
    levels = list(zip([widths[0], *widths], widths, strict=False))
    return _tower(model, size, levels, extra_blocks=0, ends=(edge, last))


def conv_decoder(model: Model, size: int) -> ConvFlops:
    """To an image of `size` px."""
    widths, positions = channels_of(conv_of(model))[::-1], (size // model.patch_size) ** 2
    latents = model.latent_channels
    edge = linear(positions, latents, latents) + convolution(positions, latents, widths[0], 3)
    last = convolution(size**2, widths[-1], 3, 3)
    levels = list(zip([widths[0], *widths], widths, strict=False))[::-1]
    return _tower(model, size, levels, extra_blocks=1, ends=(edge, last))


def _tower(
    model: Model, size: int, levels: list[tuple[int, int]], extra_blocks: int, ends: tuple[float, float]
) -> ConvFlops:
    """`levels` are (channels in, channels) from the highest resolution down; every level but the lowest or, of the
    decoder, the highest is followed by a change of resolution."""
    conv, lowest = conv_of(model), channels_of(conv_of(model))[-1]
    blocks = list(_blocks(levels, size, conv.num_res_blocks + extra_blocks))
    positions = (size // model.patch_size) ** 2
    middle = [_block(positions, lowest, lowest)] * 2
    attending = [(positions, lowest), *_attending(levels, size, conv.num_res_blocks + extra_blocks, conv)]
    scores = sum(attention(length**2, channels) for length, channels in attending)
    attended = scores + sum(linear(length, channels, 4 * channels) for length, channels in attending)
    # Either way the convolution is at the higher resolution's half, or at the higher one: one for each step.
    steps = sum(
        convolution((size // 2 ** (depth + 1 - extra_blocks)) ** 2, channels, channels, 3)
        for depth, channels in _stepping(levels, extra_blocks)
    )
    all_blocks = [*blocks, *middle]
    return ConvFlops(
        forward=sum(block.forward for block in all_blocks) + attended + steps + sum(ends),
        edge=ends[0],
        again=sum(block.shortcut + block.conv1 for block in all_blocks),
        scores=scores,
    )


def _stepping(levels: list[tuple[int, int]], is_decoder: int) -> Iterator[tuple[int, int]]:
    """(depth of the higher resolution, channels) of every change of resolution: those of the level it comes from."""
    for depth in range(len(levels) - 1):
        yield depth, levels[depth + 1 if is_decoder else depth][1]


def _blocks(levels: list[tuple[int, int]], size: int, num_blocks: int) -> Iterator[_Block]:
    for depth, (before, channels) in enumerate(levels):
        positions = (size // 2**depth) ** 2
        yield _block(positions, before, channels)
        for _ in range(num_blocks - 1):
            yield _block(positions, channels, channels)


def _attending(levels: list[tuple[int, int]], size: int, num_blocks: int, conv: Conv) -> Iterator[tuple[int, int]]:
    """(positions, channels) of the attention behind every block of the coarsest levels."""
    for depth in range(len(levels) - conv.attention_levels, len(levels)):
        for _ in range(num_blocks):
            yield (size // 2**depth) ** 2, levels[depth][1]


def _block(positions: int, before: int, channels: int) -> _Block:
    return _Block(
        shortcut=convolution(positions, before, channels, 1) if before != channels else 0,
        conv1=convolution(positions, before, channels, 3),
        conv2=convolution(positions, channels, channels, 3),
    )
