"""Which layers meet how many tokens and pixels in a step of stage 2: what fills the table of profiling/flops.py for it.

    decoder_gan_flops(config, model, world_size=8, listens=1.0, judges=1.0).as_table()

Rules as in profiling/step/flops.py; held against torch's FlopCounterMode in tests/profiling/test_decoder_gan_flops.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from configs import DecoderGan
from configs.architecture import Model
from configs.decoder_gan import Discriminator
from model.discriminator import PatchGan
from model.pack import pack
from profiling.flops import Component, StepFlops, convolution, linear
from profiling.step.layer_flops import patch_edge, perceptual_forward, tokens_and_squares, vit_block


def decoder_gan_flops(
    config: DecoderGan, model: Model, world_size: int, listens: float, judges: float, backend: str = "sdpa"
) -> StepFlops:
    """One step of one rank. In a share `listens` of the steps the decoder has an adversarial term, in a share `judges`
    the discriminator steps. `backend` is the resolved attention."""
    rows = config.batch.images // world_size
    parts = [*_frozen(config, model, rows), *_decoder(config, model, rows, backend)]
    parts += _adversaries(config, model, rows, listens, judges)
    return StepFlops.of(parts, {})


def discriminator_forward(config: Discriminator, size: int) -> tuple[float, float]:
    """One picture of `size` pixels: all convolutions, and of these the first."""
    with torch.device("meta"):
        network = PatchGan(config)
    flops = []
    for conv in (network.first, *network.convs, network.last):
        size = (size + 2 - 4) // conv.stride[0] + 1
        flops.append(convolution(size**2, conv.in_channels, conv.out_channels, side=4))
    return sum(flops), flops[0]


def _frozen(config: DecoderGan, model: Model, rows: int) -> Iterator[Component]:
    """Encoder and bottleneck, forward alone."""
    size, trunk = config.views.image_size, model.trunk
    layout = pack({"clip": (rows, size, size)}, model.patch_size, prefix=1 + model.registers)
    [group] = layout.groups
    block = vit_block(trunk, layout.tokens, tokens_and_squares(group.segments, group.length)[1], layout.tokens)
    patches = rows * group.grid[0] * group.grid[1]
    forward = trunk.depth * block.forward + patch_edge(model, trunk.width, patches)
    yield Component("trunk", "rec", forward, scores=trunk.depth * block.scores)
    yield Component("bottleneck", "rec", linear(patches, trunk.width, model.latent_channels))


def _decoder(config: DecoderGan, model: Model, rows: int, backend: str) -> Iterator[Component]:
    """The decoder, whose latents have no gradient, and the perceptual network, of which pixels alone have one."""
    size, vit = config.views.image_size, model.decoder
    tokens, squares = tokens_and_squares(rows, (size // model.patch_size) ** 2)
    block = vit_block(vit, tokens, squares, tokens)
    again = block.again(config.system.activation_checkpointing, backend, vit.layer_scale is None)
    first, last = linear(tokens, model.latent_channels, vit.width), patch_edge(model, vit.width, tokens)
    forward = first + vit.depth * block.forward + last
    yield Component("decoder", "rec", forward, 2 * forward - first, vit.depth * again, scores=vit.depth * block.scores)
    if config.objectives.rec.perceptual:
        vgg, compared = perceptual_forward(size)
        yield Component("perceptual", "rec", rows * (2 * vgg + compared), rows * (vgg + compared))


def _adversaries(config: DecoderGan, model: Model, rows: int, listens: float, judges: float) -> Iterator[Component]:
    size = config.views.image_size
    forward, first = discriminator_forward(config.discriminator, size)
    judged = listens * rows * forward
    yield Component("discriminator, of the decoder", "gan", judged, judged)
    if config.objectives.gan.balance == "adaptive":
        patches = rows * (size // model.patch_size) ** 2
        yield Component("adaptive weight", "gan", listens * 2 * patch_edge(model, model.decoder.width, patches))
    both = judges * 2 * rows
    yield Component("discriminator", "gan", both * forward, both * (2 * forward - first))
