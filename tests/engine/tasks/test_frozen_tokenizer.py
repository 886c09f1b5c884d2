"""The tokenizer's file: pinned by what it holds, and one clear error for whatever stage 2 cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError, fingerprint
from configs.model import Model
from engine.tasks.frozen_tokenizer import described_tokenizer, initial_decoder
from model.tokenizer import VisualTokenizer, decode_pixels
from model.weights import digest, write_weights
from tests.engine.tasks.decoder_gan_runs import stage_config
from tests.model.tiny_weights import NO_REC, write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("stage1") / "run", tiny_config()) / "weights.safetensors"


def test_its_digest_is_science_and_its_place_is_not(weights: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved.safetensors", tmp_path / "changed.safetensors"
    moved.write_bytes(weights.read_bytes())
    tensors = load_file(weights)
    write_weights(changed, tensors | {"trunk.norm.weight": tensors["trunk.norm.weight"] + 1}, tiny_config().model)
    here, there, other = (stage_config(path) for path in (weights, moved, changed))
    assert here.tokenizer.sha256 == digest(weights)
    assert fingerprint(here) == fingerprint(there) != fingerprint(other)
    with pytest.raises(UserError, match="this is another file"):
        stage_config(changed, tokenizer={"sha256": here.tokenizer.sha256})


def test_the_first_decoder_is_the_files(weights: Path) -> None:
    config, tokenizer = stage_config(weights), VisualTokenizer.from_file(weights)
    latent = torch.randn(2, 8, 4, 4)
    decoder = initial_decoder(config, described_tokenizer(config))
    torch.testing.assert_close(decode_pixels(decoder, latent), tokenizer.decode(latent), rtol=0, atol=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.weights=.*nowhere.* is not a file: stage 2 trains the decoder"):
        stage_config(tmp_path / "nowhere.safetensors")


def test_a_truncated_file_is_named(weights: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut.safetensors is not a safetensors file, or is cut off"):
        stage_config(cut)


def test_weights_without_a_decoder_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config(*NO_REC))
    with pytest.raises(UserError, match="has no bottleneck and no decoder: stage 2 needs trunk, bottleneck, decoder"):
        stage_config(run / "weights.safetensors")


def test_weights_of_another_width_than_they_describe_are_refused(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_weights(other, load_file(weights), tiny_config("model.decoder.width=64").model)
    with pytest.raises(UserError, match=r"decoder.proj_in.weight is \(64, 8\), and holds \(32, 8\)"):
        stage_config(other)
    write_weights(other, load_file(weights), tiny_config("model.trunk.depth=3").model)
    with pytest.raises(UserError, match=r"trunk.blocks.2.*, and holds none: its tensors are another model's"):
        stage_config(other)


def test_convolutions_are_refused(weights: Path, tmp_path: Path) -> None:
    other, conv = tmp_path / "other.safetensors", {"channels": 32, "multipliers": [1, 1, 2, 2]}
    model = tiny_config().model.model_dump() | {"trunk": None, "decoder": None, "conv": conv}
    write_weights(other, load_file(weights), Model.model_validate(model))
    with pytest.raises(UserError, match="is an autoencoder of convolutions"):
        stage_config(other)


def test_pictures_must_hold_whole_patches_of_the_tokenizer(weights: Path) -> None:
    with pytest.raises(UserError, match=r"views.image_size=36 is not a multiple of 8, the patch size of"):
        stage_config(weights, views={"image_size": 36})


def test_a_file_without_a_word_on_its_model_takes_the_config_beside_it(weights: Path, tmp_path: Path) -> None:
    bare = tmp_path / "weights.safetensors"
    save_file(load_file(weights), bare)
    (tmp_path / "config.yaml").write_text((weights.parent / "config.yaml").read_text())
    assert described_tokenizer(stage_config(bare)) == tiny_config().model
