"""A generator from its section: the one place that knows the kinds.

generator = build(Diffusion(width=192, depth=6, heads=3), LatentShape(16, 8, 8), num_classes=10, attention="sdpa")
leaves(generator)       # [ModulatedBlock]: what ZeRO-3 gathers, compiles and computes again as one
"""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from configs.autoregressive import Autoregressive
from configs.generator import Generator
from model.generator.autoregressive import AutoregressiveGenerator
from model.generator.diffusion import DiffusionGenerator
from model.generator.diffusion_head import HeadBlock
from model.generator.modulated_block import ModulatedBlock
from model.generator.shape import LatentShape
from model.generator.token_block import TokenBlock

AnyGenerator: TypeAlias = DiffusionGenerator | AutoregressiveGenerator
BLOCKS = (ModulatedBlock, TokenBlock, HeadBlock)


def build(section: Generator, shape: LatentShape, num_classes: int, attention: str = "sdpa") -> AnyGenerator:
    """The module, its parameters not yet filled (model/generator/initialise.py). `attention` is a resolved backend."""
    if isinstance(section, Autoregressive):
        return AutoregressiveGenerator(section, shape, num_classes, attention)
    return DiffusionGenerator(section, shape, num_classes, attention)


def leaves(generator: nn.Module) -> list[type[nn.Module]]:
    """The kinds of blocks that `generator` is made of."""
    return [kind for kind in BLOCKS if any(isinstance(module, kind) for module in generator.modules())]
