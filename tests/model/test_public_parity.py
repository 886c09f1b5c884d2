"""The public tokenizer's weights, imported, give the public outputs; exported, they are the same again."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.model import Model
from model.imagenet import denormalise, normalise
from model.public_layout import from_public, to_public
from model.text import pack_captions
from model.tokenizer import VisualTokenizer
from tests.parity import reference, reference_metadata

pytestmark = pytest.mark.L0
# Measured worst 6e-6, of 5 (masked crops); rotating queries in float32 instead of bf16 is off by 4e-4.
TOLERANCE = 1e-4


@cache
def public() -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = {
        key.removeprefix("state."): t for key, t in reference("tokenizer_default").items() if key.startswith("state.")
    }
    return state, json.loads(reference_metadata("tokenizer_default")["config"])


@cache
def imported() -> tuple[dict[str, Tensor], Model]:
    return from_public(*public())


@cache
def tokenizer() -> VisualTokenizer:
    state, model = imported()
    return VisualTokenizer.from_state(model, state)


def check(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, reference("tokenizer_default")[f"out.{name}"], rtol=0, atol=TOLERANCE)


def run_trunk(crops: dict[str, Tensor], masks: dict[str, Tensor], names: dict[str, str]) -> None:
    """Checks cls and patches of every group of `crops` against the outputs whose prefix `names` gives."""
    trunk = tokenizer().trunk
    x_TD, layout = trunk(crops, masks), trunk.layout(crops)
    for group, prefix in names.items():
        check(layout.cls(x_TD, group), f"{prefix}cls")
        check(layout.patches(x_TD, group), f"{prefix}patch")


def test_trunk_features_equal_the_reference() -> None:
    run_trunk({"clip": reference("tokenizer_default")["in.image"]}, {}, {"clip": ""})


def test_masked_and_local_crops_in_one_pass_equal_the_reference() -> None:
    values = reference("tokenizer_default")
    crops = {"ssl_global": values["in.image"], "ssl_local": values["in.local"]}
    run_trunk(crops, {"ssl_global": values["in.mask"]}, {"ssl_global": "masked_global_", "ssl_local": "local_"})


def test_intermediate_features_equal_the_reference() -> None:
    crops = {"clip": reference("tokenizer_default")["in.image"]}
    trunk = tokenizer().trunk
    layout, (mid_TD, last_TD) = trunk.layout(crops), trunk.intermediate(crops, last=2)
    check(layout.cls(mid_TD, "clip"), "mid_cls")
    check(layout.patches(mid_TD, "clip"), "mid_patch")
    check(layout.patches(last_TD, "clip"), "patch")


@pytest.mark.parametrize(("image", "suffix"), [("image", ""), ("wide", "_wide")])
def test_latents_and_reconstructions_equal_the_reference(image: str, suffix: str) -> None:
    values = reference("tokenizer_default")
    pixels = values[f"in.{image}"] * 0.2  # encode takes [0, 1]: check the way there on numbers that denormalise allows
    torch.testing.assert_close(normalise(denormalise(pixels)), pixels, rtol=0, atol=1e-5)
    ours = tokenizer()
    crops = {"clip": values[f"in.{image}"]}
    x_TD, layout = ours.trunk(crops, {}), ours.trunk.layout(crops)
    assert ours.bottleneck is not None
    assert ours.decoder is not None
    latent_BPL, grid = ours.bottleneck(layout.patches(x_TD, "clip")), layout.group("clip").grid
    check(latent_BPL.transpose(1, 2).unflatten(2, grid), f"latent{suffix}")
    check(ours.decoder(latent_BPL, grid), f"recon{suffix}")
    torch.testing.assert_close(
        ours.decode(values[f"out.latent{suffix}"]),
        denormalise(values[f"out.recon{suffix}"]),
        rtol=0,
        atol=TOLERANCE,
    )


def test_clip_features_and_logits_equal_the_reference() -> None:
    values, ours = reference("tokenizer_default"), tokenizer()
    crops = {"clip": values["in.image"]}
    cls_BD = ours.trunk.layout(crops).cls(ours.trunk(crops, {}), "clip")
    assert ours.clip is not None
    assert ours.text is not None
    text_BE = ours.text(pack_captions(values["in.text"]))
    image_BE, _, scale, bias = ours.clip(cls_BD, text_BE[:2])
    check(image_BE, "clip_image")
    check(ours.embed_captions(values["in.text"]), "clip_text")
    check(scale * image_BE @ ours.embed_captions(values["in.text"]).T, "logits")
    assert bias is None


def test_export_after_import_is_the_identity() -> None:
    state, described = public()
    exported, config = to_public(*imported(), image_size=described["image_size"])
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name
    assert config == {"model_type": "vtp", **described, "nonscalar_logit_scale": False}


def test_import_after_export_is_the_identity() -> None:
    state, model = imported()
    again, same_model = from_public(*to_public(state, model, image_size=64))
    assert same_model == model
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
