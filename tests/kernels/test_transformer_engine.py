"""Blocks on Transformer Engine: wiring against a stand-in with the real parameter lists; the real one where it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from configs import Config
from engine import block_transforms
from engine.block_transforms import checkpoint_activations
from engine.step import model_inputs
from kernels import fp8
from kernels.fp8 import MXFP8_MULTIPLE, LinearBackend, LinearParameters
from model.block import Block
from model.initialise import initialise
from model.outputs import Outputs
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.text import TextBlock
from tests.kernels.te_stand_in import Library, bind, installed
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.L0
CURRENT = LinearBackend("fp8_te", "chosen by the test", recipe="Float8CurrentScaling")
# A context of 13 and batch of 12 give the text tower 156 tokens, no multiple of 16.
CHANGES = ("optim.precision=bf16", "system.linear=fp8_te", "model.trunk.mlp_ratio=3", "model.decoder.mlp_ratio=3",
           "model.text.context=13")  # fmt: skip


def _pretrainer(config: Config) -> Pretrainer:
    """In float32, whatever the config says: the stand-in rounds nothing, so equal means equal.

    Vectors are random: a norm with weight 1 may be applied twice and nobody sees it.
    """
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1), "matmul")
    initialise(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def _convert(model: Pretrainer, config: Config, choice: LinearBackend, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(fp8, "resolve_linears", lambda *_: choice)
    monkeypatch.setattr(block_transforms.distributed, "group", lambda: "all ranks")
    return block_transforms.convert_to_fp8(model, config, torch.device("cpu"))


def _loss(outputs: Outputs) -> Tensor:
    """A number that every tower moves. Each entry has a weight of its own: clip's vectors are normalised."""
    assert outputs.clip is not None
    assert outputs.rec is not None
    assert outputs.ssl is not None
    parts = (outputs.clip.text_BE, outputs.clip.image_BE, outputs.ssl.student_patch_ME, outputs.rec.recon)
    return torch.stack([(part * torch.linspace(-1, 1, part.numel()).view_as(part)).mean() for part in parts]).sum()


@pytest.fixture
def te() -> Iterator[Library]:
    with installed() as library:
        yield library


def test_a_converted_model_holds_the_same_and_computes_the_same(te: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(*CHANGES)
    plain, converted = _pretrainer(config), _pretrainer(config)
    before = [(name, id(parameter)) for name, parameter in converted.named_parameters()]
    said = _convert(converted, config, CURRENT, monkeypatch)
    assert said == "fp8_te (chosen by the test): 16 of 16 linears"
    assert [(name, id(parameter)) for name, parameter in converted.named_parameters()] == before
    assert converted.state_dict().keys() == plain.state_dict().keys()

    inputs = model_inputs(random_batch(config, 0), torch.device("cpu"))
    losses = [_loss(model(**inputs)) for model in (plain, converted)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            # A norm left out or done twice is off by 0.1.
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_norm_is_fused_and_only_the_students_blocks_are(te: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(*CHANGES)
    model = _pretrainer(config)
    _convert(model, config, CURRENT, monkeypatch)
    # Two trunk blocks, one of the decoder (LayerNorm), one of the text tower.
    kinds = [(made["kind"], made.get("normalization")) for made in te.made]
    rms = [("LayerNormLinear", "RMSNorm"), ("Linear", None), ("LayerNormMLP", "RMSNorm")]
    layer = [("LayerNormLinear", "LayerNorm"), ("Linear", None)]
    assert kinds == rms * 2 + [*layer, ("LayerNormMLP", "LayerNorm")] + layer * 2
    assert {made["eps"] for made in te.made if "eps" in made} == {1e-5, 1e-6}
    assert all(made["device"] == "meta" and made["params_dtype"] == torch.float32 for made in te.made)

    checkpoint_activations(model, "full", (Block, TextBlock))
    loss = _loss(model(**model_inputs(random_batch(config, 0), torch.device("cpu"))))
    assert te.calls_in_fp8 == len(te.made), "one call each: none of the teacher's, none twice"
    loss.backward()
    assert te.calls_in_fp8 == 2 * len(te.made), "what is computed again in backward is in FP8 as well"
    for region in te.regions:
        assert region["enabled"] is True
        assert type(region["recipe"]).__name__ == "Float8CurrentScaling"
        assert region["amax_reduction_group"] == "all ranks"


def test_layers_that_do_not_fit_stay_as_they_are(te: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden = 88 is no multiple of 16: the MLPs of trunk and decoder keep their norms."""
    config = tiny_config("optim.precision=bf16", "system.linear=fp8_te")
    plain, model = _pretrainer(config), _pretrainer(config)
    said = _convert(model, config, CURRENT, monkeypatch)
    assert said.endswith("10 of 16 linears; 6 with a side that is no multiple of 16")
    inputs = model_inputs(random_batch(config, 0), torch.device("cpu"))
    torch.testing.assert_close(_loss(model(**inputs)), _loss(plain(**inputs)))


@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
def test_any_number_of_tokens_is_filled_up_to_the_multiple(te: Library, tokens: int) -> None:
    layer = nn.Linear(32, 64)
    block_transforms = LinearBackend("fp8_te", "", MXFP8_MULTIPLE, recipe="MXFP8BlockScaling")
    product = fp8.te_linear(LinearParameters(layer.weight, layer.bias, n=64, k=32), block_transforms)
    x = torch.randn(tokens, 32)
    torch.testing.assert_close(fp8.te_autocast(product, block_transforms, None)(x), layer(x))
    assert type(te.regions[0]["recipe"]).__name__ == "MXFP8BlockScaling"


@pytest.mark.parametrize(
    ("capability", "widths", "recipe", "multiple"),
    [
        ((8, 9), {1024, 2736}, "Float8CurrentScaling", 16),
        ((9, 0), {1024, 4096}, "Float8CurrentScaling", 16),
        ((10, 0), {1536, 4096}, "MXFP8BlockScaling", 32),
        ((10, 0), {1024, 2736}, "Float8CurrentScaling", 16),  # VTP-L's hidden width is 85.5 blocks of 32
        ((12, 0), {1536, 4096}, "Float8CurrentScaling", 16),
    ],
)
def test_the_recipe_follows_hardware_and_widths(
    te: Library,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    widths: set[int],
    recipe: str,
    multiple: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = fp8.resolve_linears("fp8_te", "cuda", torch.bfloat16, widths)
    assert (found.recipe, found.multiple, found.is_gated_by_speed) == (recipe, multiple, True)
    assert recipe in found.reason


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ImportError, match=r"fp8_te needs transformer-engine \(.*\): pip install --no-build-isolation"):
        fp8.resolve_linears("fp8_te", "cuda")


def test_the_stand_in_refuses_what_the_real_signatures_do_not_have() -> None:
    assert bind("Linear", 4, 8, device="meta") == {"in_features": 4, "out_features": 8, "device": "meta"}
    with pytest.raises(TypeError, match="fp8_recipe"):
        bind("autocast", enabled=True, fp8_recipe=None)
