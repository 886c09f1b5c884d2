"""A tiny autoregressive generator, filled with values that let every part matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from configs.generator import Autoregressive, DiffusionHeadConfig
from model.generator.autoregressive import AutoregressiveGenerator
from model.generator.draws import DrawCounts, RandomDraws, draw
from model.generator.factory import build_generator
from model.generator.tokens import LatentShape
from model.initialise import initialise_generator

SHAPE = LatentShape(3, 4, 4)
CLASSES = 4


def section(order: str = "masked", objective: str = "noise", **settings: Any) -> Autoregressive:
    """Two blocks of width 32 and a head of two."""
    head = DiffusionHeadConfig(width=32, depth=2, objective=objective, repeats=settings.pop("repeats", 4))
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "buffer": 3, "head": head} | settings
    return Autoregressive(order=order, **sizes)


def tiny(order: str = "masked", objective: str = "noise", shape: LatentShape = SHAPE, **settings: Any) -> Any:
    """Initialised, then moved off the zeros a fresh head starts from."""
    made = section(order, objective, **settings)
    generator = build_generator(made, shape, CLASSES)
    assert isinstance(generator, AutoregressiveGenerator)
    initialise_generator(generator, made, seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return generator


def drawn(needs: DrawCounts, rows: int = 2, seed: int = 0, step: int = 0) -> RandomDraws:
    """The numbers of the first `rows` positions."""
    return draw(needs, seed, step, np.arange(rows))
