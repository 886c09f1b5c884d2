"""First values: complete, and a function of the seed and the parameter's name alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs import Config
from model.initialise import initialise, initialise_parameter
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer, student_teacher_pairs
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
EVERYTHING = (
    "model.trunk.layer_scale=0.1",
    "model.decoder.layer_scale=0.2",
    "model.trunk.qk_norm=true",
    "model.registers=1",
    "objectives.clip.kind=sigmoid",
)


def build(config: Config) -> Pretrainer:
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialise(model, config)
    return model


def values(model: Pretrainer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_no_parameter_is_left_out() -> None:
    assert [name for name, value in values(build(tiny_config(*EVERYTHING))).items() if not value.isfinite().all()] == []


def test_special_parameters_start_as_the_table_says() -> None:
    start = values(build(tiny_config(*EVERYTHING)))
    constants = {
        "clip.logit_scale": 2.6592600,
        "clip.logit_bias": -10.0,
        "trunk.mask_token": 0.0,
        "trunk.blocks.0.ls1.gamma": 0.1,
        "decoder.blocks.0.ls2.gamma": 0.2,
        "trunk.blocks.1.attn.q_norm.weight": 1.0,
        "trunk.norm.weight": 1.0,
        "text.ln_final.weight": 1.0,
        "text.resblocks.0.attn.in_proj_bias": 0.0,
        "prototypes.last_layer.weight_g": 1.0,
        "decoder.proj_out.bias": 0.0,
    }
    for name, value in constants.items():
        torch.testing.assert_close(start[name], torch.full_like(start[name], value), msg=name)
    for name, std in (
        (
            "trunk.blocks.0.attn.qkv.weight",
            0.02 * 0.88,
        ),  # a normal cut at 2 standard deviations has 0.88 of one left
        ("text.resblocks.0.attn.in_proj_weight", 32**-0.5),
        ("text.resblocks.0.mlp.c_proj.weight", 64**-0.5),
        ("text.token_embedding.weight", 0.02),
        ("bottleneck.weight", 32**-0.5),
        ("decoder.proj_in.weight", 8**-0.5),
        ("decoder.proj_out.weight", 32**-0.5),
    ):
        assert start[name].std().item() == pytest.approx(std, rel=0.1), name


def test_the_teacher_starts_as_the_student() -> None:
    pairs = student_teacher_pairs(build(tiny_config()))
    assert {name.split(".")[0] for name, _, _ in pairs} == {"trunk", "prototypes"}
    assert all(torch.equal(student, teacher) for _, student, teacher in pairs)


def test_values_do_not_depend_on_what_else_is_built_nor_on_torchs_seed() -> None:
    torch.manual_seed(1)
    whole = values(build(tiny_config()))
    torch.manual_seed(2)
    part = values(build(tiny_config("batch.ssl=0", "objectives.ssl.weight=0")))
    assert 0 < len(part) < len(whole)
    assert all(torch.equal(value, whole[name]) for name, value in part.items())


def test_weights_do_not_depend_on_the_version_of_torch() -> None:
    """torch 2.13 draws truncated normals otherwise than 2.11; these are the numbers of 2.13."""
    drawn = torch.empty(96, 32)
    initialise_parameter("trunk.blocks.0.attn.qkv.weight", drawn, tiny_config())
    assert drawn[0, :3].tolist() == pytest.approx([0.0248173606, 0.0124898516, 0.0135477185], abs=1e-7)
    assert 0.0399 < drawn.abs().max().item() <= 0.04


def test_seeds_and_names_make_different_values() -> None:
    name, other = "decoder.blocks.0.mlp.w3.weight", "trunk.blocks.0.mlp.w3.weight"
    first, second = values(build(tiny_config())), values(build(tiny_config("seed=1")))
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first[other])


def test_a_fused_product_starts_as_its_parts() -> None:
    config, name = tiny_config(), "trunk.blocks.0.mlp.w12.weight"
    whole = values(build(config))[name]
    parts = [torch.empty_like(half) for half in whole.chunk(2)]
    for part, half in zip(("w1", "w2"), parts, strict=True):
        initialise_parameter(name.replace("w12", part), half, config)
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(*parts)


def test_a_bf16_parameter_holds_the_rounded_float32_value() -> None:
    config, name = tiny_config(), "trunk.blocks.0.mlp.w12.weight"
    whole = values(build(config))[name]
    half = torch.empty_like(whole, dtype=torch.bfloat16)
    initialise_parameter(name, half, config)
    assert torch.equal(half, whole.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_drawn_on_a_gpu_are_spread_as_those_drawn_on_the_cpu() -> None:
    config = tiny_config(*EVERYTHING)
    for name, expected in values(build(config)).items():
        found, again = torch.empty_like(expected, device="cuda"), torch.empty_like(expected)
        initialise_parameter(name, found, config, "cuda")
        initialise_parameter(f"teacher.{name}", again, config, "cuda")
        assert torch.equal(found.cpu(), again)
        if expected.numel() > 1:
            # Of n normal numbers the deviation is known to (2n)^-1/2 of itself; both draws, and five times that.
            std, tolerance = float(expected.std()), 5 * expected.numel() ** -0.5
            assert float(found.std()) == pytest.approx(std, rel=tolerance), name
