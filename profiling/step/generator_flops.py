"""What a generator computes: FLOPs of its forward pass, by the rules of profiling/flops.py.

    section = Diffusion(width=1152, depth=28, heads=16)
    generator_flops(section, LatentShape(32, 16, 16), num_classes=1000, batch=1) / 1e9      # 237.3: LightningDiT-XL/1

A training step takes three times as many, forward and backward; a sample one for each evaluation of its sampler, two
where it is guided.
"""

from __future__ import annotations

from configs.autoregressive import Autoregressive
from configs.generator import Diffusion, Generator
from model.block import swiglu_hidden
from model.generator.conditioning import FREQUENCIES
from model.generator.shape import LatentShape
from model.generator.variance import outputs
from profiling.flops import attention, linear
from profiling.step.autoregressive_flops import autoregressive_flops


def generator_flops(section: Generator, shape: LatentShape, num_classes: int, batch: int) -> float:
    """FLOPs of one forward pass over `batch` latents. Classes are looked up, not multiplied: `num_classes` is free."""
    if isinstance(section, Autoregressive):
        return autoregressive_flops(section, shape, batch)
    return _diffusion(section, shape, batch)


def _diffusion(section: Diffusion, shape: LatentShape, batch: int) -> float:
    rows, columns = shape.grid(section.patch)
    tokens, width, numbers = batch * rows * columns, section.width, shape.channels * section.patch**2
    block = (
        linear(batch, width, 6 * width)
        + linear(tokens, width, 4 * width)  # queries, keys, values; out
        + attention(batch * (rows * columns) ** 2, width)
        + _mlp(section, tokens)
    )
    ends = (
        linear(tokens, numbers, width)
        + linear(batch, width, 2 * width)
        + linear(tokens, width, outputs(section) * numbers)
    )
    time = linear(batch, FREQUENCIES, width) + linear(batch, width, width)
    return section.depth * block + ends + time


def _mlp(section: Diffusion, tokens: float) -> float:
    """Three products with SwiGLU, two with GELU."""
    if section.mlp == "swiglu":
        return 3 * linear(tokens, section.width, swiglu_hidden(section.width, section.mlp_ratio))
    return 2 * linear(tokens, section.width, int(section.width * section.mlp_ratio))
