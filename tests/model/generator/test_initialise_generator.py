"""A generator's first values: complete, and a function of the seed and the parameter's name alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.generator.factory import build_generator
from model.initialise import initialise_generator, initialise_generator_parameter
from tests.model.generator.tiny_generator import KINDS, NUM_CLASSES, SHAPE, section

pytestmark = pytest.mark.L0


def values(seed: int = 0, **settings: object) -> dict[str, Tensor]:
    chosen = section(**settings)
    generator = build_generator(chosen, SHAPE, NUM_CLASSES)
    for parameter in generator.parameters():
        parameter.data.fill_(torch.nan)
    initialise_generator(generator, chosen, seed)
    return {name: parameter.detach() for name, parameter in generator.named_parameters()}


@pytest.mark.parametrize("kind", [*KINDS, "qk norm"])
def test_no_parameter_is_left_out(kind: str) -> None:
    settings = {"qk_norm": True} if kind == "qk norm" else KINDS[kind]
    assert [name for name, value in values(**settings).items() if not value.isfinite().all()] == []


def test_parameters_start_as_the_table_says() -> None:
    start = values(qk_norm=True, width=64)
    for name, constant in {
        "backbone.embed.linear.bias": 0.0,
        "backbone.blocks.0.norm1.weight": 1.0,
        "backbone.blocks.1.attn.q_norm.weight": 1.0,
        "backbone.blocks.0.modulation.weight": 0.0,
        "backbone.final.norm.weight": 1.0,
        "backbone.final.modulation.weight": 0.0,
        "backbone.final.linear.weight": 0.0,
    }.items():
        assert torch.equal(start[name], torch.full_like(start[name], constant)), name
    for name, std in {
        "backbone.label.table.weight": 0.02,
        "backbone.time.linear1.weight": 0.02,
        "backbone.time.linear2.weight": 0.02,
        "backbone.blocks.0.attn.qkv.weight": (2 / (64 + 192)) ** 0.5,  # uniform within b has the deviation b / 3^0.5
        "backbone.blocks.1.mlp.w3.weight": (2 / (176 + 64)) ** 0.5,
        "backbone.embed.linear.weight": (2 / (3 + 64)) ** 0.5,
    }.items():
        assert start[name].std().item() == pytest.approx(std, rel=0.12), name


def test_seeds_and_names_make_different_values_and_depth_does_not() -> None:
    name = "backbone.blocks.0.attn.qkv.weight"
    first, deeper, other = values(), values(depth=3), values(seed=1)
    assert all(torch.equal(value, deeper[name]) for name, value in first.items())
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("blocks.0", "blocks.1")])


def test_a_bf16_parameter_holds_the_rounded_float32_value_whatever_torchs_seed() -> None:
    name = "backbone.blocks.0.mlp.w12.weight"
    whole = values()[name]
    half = torch.empty_like(whole, dtype=torch.bfloat16)
    torch.manual_seed(7)
    initialise_generator_parameter(name, half, section(), seed=0)
    assert torch.equal(half, whole.bfloat16())
