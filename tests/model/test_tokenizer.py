"""What users of the weights meet: encode, decode, embeddings, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import Config, UserError, to_yaml
from model.initialise import initialise
from model.interchange import main
from model.pretrainer import Pretrainer
from model.rows import Rows
from model.tokenizer import VisualTokenizer
from model.weights import read_weights, write_weights
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
NO_CLIP = ("objectives.clip.weight=0", "batch.ssl=0", "objectives.ssl.weight=0")
NO_REC = ("batch.rec=0", "objectives.rec.weight=0")


def build(config: Config) -> Pretrainer:
    model = Pretrainer(config, Rows.per_rank(config, 1))
    initialise(model, config)
    return model


def write_run(run: Path, config: Config) -> Path:
    run.mkdir()
    write_weights(run / "weights.safetensors", build(config).state_dict(), config.model)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def test_it_encodes_and_decodes_as_the_pretrainer_does() -> None:
    config = tiny_config()
    model, batch = build(config), random_batch(config, step=0)
    tokenizer = VisualTokenizer.from_state(config.model, model.state_dict())
    outputs = model(**model_inputs(batch))
    latent = tokenizer.encode(batch.images[:6])
    assert latent.shape == (6, 8, 4, 4)
    assert tokenizer.decoder is not None
    recon = tokenizer.decoder(latent.flatten(2).transpose(1, 2), (4, 4))
    torch.testing.assert_close(recon, outputs.rec.recon, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokenizer.embed_images(batch.images), outputs.clip.image_BE, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokenizer.embed_captions(batch.captions), outputs.clip.text_BE, rtol=0, atol=1e-5)


def test_bytes_and_unit_floats_are_the_same_image_and_pixels_come_back_in_the_unit_range() -> None:
    config = tiny_config()
    tokenizer = VisualTokenizer.from_state(config.model, build(config).state_dict())
    images = random_batch(config, step=0).images[:2]
    latent = tokenizer.encode(images)
    assert tokenizer.decoder is not None
    torch.testing.assert_close(tokenizer.encode(images / 255), latent, rtol=0, atol=1e-5)
    with torch.no_grad():
        tokenizer.decoder.proj_out.weight.mul_(100)  # untrained decoders hardly leave grey
    pixels = tokenizer.decode(latent)
    assert pixels.shape == images.shape
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)


def test_any_multiple_of_the_patch_size_works_and_others_say_so() -> None:
    config = tiny_config()
    tokenizer = VisualTokenizer.from_state(config.model, build(config).state_dict())
    latent = tokenizer.encode(torch.rand(1, 3, 24, 56))
    assert latent.shape == (1, 8, 3, 7)
    assert tokenizer.decode(latent).shape == (1, 3, 24, 56)
    with pytest.raises(UserError, match="24x55"):
        tokenizer.encode(torch.rand(1, 3, 24, 55))


def test_a_part_that_was_not_trained_is_named() -> None:
    autoencoder, aligned = tiny_config(*NO_CLIP), tiny_config(*NO_REC)
    with pytest.raises(UserError, match="embed_images needs the clip"):
        VisualTokenizer.from_state(autoencoder.model, build(autoencoder).state_dict()).embed_images(
            torch.rand(1, 3, 32, 32)
        )
    with pytest.raises(UserError, match="encode needs the bottleneck"):
        VisualTokenizer.from_state(aligned.model, build(aligned).state_dict()).encode(torch.rand(1, 3, 32, 32))


def test_a_run_exports_to_the_public_layout_and_comes_back_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 0
    ours, _ = read_weights(run / "weights.safetensors")
    back, _ = read_weights(tmp_path / "back.safetensors")
    kept = {name for name in ours if name.split(".")[0] not in ("teacher", "prototypes")}
    assert back.keys() == kept
    assert all(torch.equal(back[name], ours[name]) for name in kept)
    images = torch.rand(1, 3, 32, 32)
    latents = [
        VisualTokenizer.from_run(run).encode(images),
        VisualTokenizer.from_file(tmp_path / "back.safetensors").encode(images),
    ]
    assert torch.equal(*latents)


def test_weights_without_a_description_are_read_with_the_config_beside_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = tiny_config()
    run = write_run(tmp_path / "run", config)
    save_file(build(config).state_dict(), run / "weights.safetensors")
    assert read_weights(run / "weights.safetensors")[1] == config.model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.registers=2",), "model.registers=2"),
        (("model.clip_width=16",), "model.clip_width=16"),
        (NO_REC, "no bottleneck"),
    ],
)
def test_what_the_public_layout_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config(*overrides))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "public").exists()


@pytest.mark.parametrize(
    ("old", "changed", "message"),
    [
        ('"text_pool_type": "argmax"', '"text_pool_type": "last"', "text_pool_type='last'"),
        ('"vision_depth": 2', '"vision_depth": 3', "trunk.blocks.2.norm1.weight: found nothing"),
        ('"vision_depth": 2', '"vision_depth": 1', "tensors are not of the VTP layout"),
        (
            '"vision_patch_size": 8',
            '"vision_patch_size": 4',
            "trunk.patch_embed.proj.weight: found shape (32, 3, 8, 8)",
        ),
        ('"vision_num_heads": 2', '"vision_num_heads": 4', "another RoPE"),
        ('"text_depth": 1,', "", "no text_depth"),
    ],
)
def test_a_public_directory_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, changed: str, message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    main(["export", str(run), "--out", str(tmp_path / "public")])
    described = (tmp_path / "public" / "config.json").read_text()
    assert old in described
    (tmp_path / "public" / "config.json").write_text(described.replace(old, changed))
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()


def test_missing_files_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "public")]) == 2
    assert main(["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "back")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("nowhere" in error for error in errors)
    (tmp_path / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_weights(tmp_path / "weights.safetensors")
