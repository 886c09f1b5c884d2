"""The encoder that latents are aligned with: whose features they are, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import Config, UserError
from configs.schema import AlignmentConfig
from model.frozen import FrozenTrunk
from model.imagenet import normalise
from model.tokenizer import VisualTokenizer
from model.weights import read_weights, write_weights
from tests.model.tiny_weights import write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

ENCODER = "objectives.rec.align.encoder={width: 32, depth: 2, heads: 2}"
PATCH = "objectives.rec.align.patch_size=8"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("frozen") / "run", tiny_config())


def align_of(weights: Path, *overrides: str) -> AlignmentConfig:
    config: Config = tiny_config(f"objectives.rec.align.weights={weights}", ENCODER, PATCH, *overrides)
    assert config.objectives.rec.align is not None
    return config.objectives.rec.align


def test_its_features_are_the_final_normed_patches_of_the_files_trunk(run: Path) -> None:
    encoder = FrozenTrunk.load(align_of(run / "weights.safetensors"), "sdpa", torch.float32)
    images = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    x_TD, layout = VisualTokenizer.from_run(run).features(images)
    found = encoder(normalise(images), (4, 3))
    # The trunk's sequence is padded to another length: other products' shapes, and sums that round differently.
    torch.testing.assert_close(found, layout.patches(x_TD, "clip"), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_features_of_another_grid_are_resized_and_keep_their_place(run: Path) -> None:
    encoder = FrozenTrunk.load(align_of(run / "weights.safetensors"), "sdpa", torch.float32)
    images = normalise(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    own = encoder(images, (4, 4)).unflatten(1, (4, 4))
    halved = encoder(images, (2, 2)).unflatten(1, (2, 2))
    wider = encoder(images, (8, 8)).unflatten(1, (8, 8))
    assert wider.shape == (2, 8, 8, 32)
    torch.testing.assert_close(halved.mean(dim=(1, 2)), own.mean(dim=(1, 2)), rtol=0, atol=0.2)
    # Down and across are not exchanged: what differs between upper and lower half still does.
    for axis in (1, 2):
        first, second = halved.unbind(axis)
        far, near = own.unflatten(axis, (2, 2)).mean(dim=axis + 1).unbind(axis)
        assert torch.cosine_similarity((first - second).mean(1), (far - near).mean(1)).min() > 0.9


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("objectives.rec.align.encoder.depth=3",), "align.encoder is .*depth=3.*: set it to the file's value"),
        (("objectives.rec.align.patch_size=16",), "has patch_size 8, but objectives.rec.align.patch_size is 16"),
        (("objectives.rec.align.registers=2",), "has registers 0, but objectives.rec.align.registers is 2"),
    ],
)
def test_another_encoder_than_described_is_one_clear_error(run: Path, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        FrozenTrunk.load(align_of(run / "weights.safetensors", *overrides), "sdpa", torch.float32)


def test_a_file_that_is_missing_or_has_no_trunk_or_half_of_one_is_one_clear_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objectives.rec.align.weights: .*none.safetensors does not exist"):
        FrozenTrunk.load(align_of(tmp_path / "none.safetensors"), "sdpa", torch.float32)
    state, model = read_weights(run / "weights.safetensors")
    text, half = tmp_path / "text.safetensors", tmp_path / "half.safetensors"
    write_weights(text, {name: x for name, x in state.items() if name.startswith("text.")}, model)
    write_weights(half, {name: x for name, x in state.items() if "blocks.1" not in name}, model)
    with pytest.raises(UserError, match=r"text\.safetensors has no transformer trunk"):
        FrozenTrunk.load(align_of(text), "sdpa", torch.float32)
    with pytest.raises(UserError, match=r"its trunk does not have the shape in its description.*blocks\.1"):
        FrozenTrunk.load(align_of(half), "sdpa", torch.float32)


def test_stochastic_depth_of_its_training_does_not_matter(tmp_path: Path) -> None:
    trained_with = tiny_config("model.trunk.drop_path=0.3")
    there = write_run(tmp_path / "dropped", trained_with)
    FrozenTrunk.load(align_of(there / "weights.safetensors"), "sdpa", torch.float32)
