"""What users of the weights meet: encode, decode, embeddings, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import UserError
from model.autoencoder import Autoencoder
from model.public_layout import to_public
from model.tokenizer import VisualTokenizer
from model.weights import read_weights, write_weights
from tests.model.tiny_weights import NO_REC, build, tokenizer_of, write_run
from tests.tiny import CONV, model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
NO_CLIP = ("objectives.clip.weight=0", "batch.ssl=0", "objectives.ssl.weight=0")


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


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 32, 3), (2, 1, 32, 32), (2, 4, 32, 32)])
def test_a_tensor_that_is_no_batch_of_rgb_images_is_refused_by_its_shape(shape: tuple[int, ...]) -> None:
    config = tiny_config()
    tokenizer = VisualTokenizer.from_state(config.model, build(config).state_dict())
    with pytest.raises(UserError, match=r"images of shape .* must be \(batch, 3, height, width\)") as caught:
        tokenizer.encode(torch.rand(shape))
    assert str(shape) in str(caught.value)
    with pytest.raises(UserError, match=r"type torch.int64: they must be .* uint8"):
        tokenizer.encode(torch.zeros(2, 3, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize("convolutions", [(), CONV])
@pytest.mark.parametrize("latent", ["deterministic", "gaussian"])
def test_returned_tensors_are_contiguous_whatever_the_strides_of_the_input(
    tmp_path: Path, convolutions: tuple[str, ...], latent: str
) -> None:
    config = tiny_config(f"model.latent={latent}", *convolutions)
    tokenizer = tokenizer_of(config)
    vae = Autoencoder(tokenizer)
    for images in (torch.rand(2, 3, 32, 48), torch.rand(1, 32, 48, 3).permute(0, 3, 1, 2)):
        encoded = tokenizer.encode(images)
        distribution = vae.encode(images * 2 - 1).latent_dist
        channels_last = encoded.contiguous(memory_format=torch.channels_last)
        returned = {
            "encode": encoded,
            "decode": tokenizer.decode(channels_last),
            "features": tokenizer.features(images)[0],
            "mode": distribution.mode(),
            "sample": distribution.sample(),
            "std": distribution.std,
            "vae.decode": vae.decode(channels_last).sample,
        }
        if latent == "gaussian":
            returned |= tokenizer.moments(images)._asdict()
        if not convolutions:
            returned["embed_images"] = tokenizer.embed_images(images)
            returned["embed_captions"] = tokenizer.embed_captions(random_batch(config, step=0).captions)
        assert [name for name, tensor in returned.items() if not tensor.is_contiguous()] == []
        save_file({"latent": encoded}, tmp_path / "latent.safetensors")  # refuses what is not


def test_a_part_that_was_not_trained_is_named() -> None:
    autoencoder, aligned = tiny_config(*NO_CLIP), tiny_config(*NO_REC)
    with pytest.raises(UserError, match="embed_images needs the clip"):
        VisualTokenizer.from_state(autoencoder.model, build(autoencoder).state_dict()).embed_images(
            torch.rand(1, 3, 32, 32)
        )
    with pytest.raises(UserError, match="encode needs the bottleneck"):
        VisualTokenizer.from_state(aligned.model, build(aligned).state_dict()).encode(torch.rand(1, 3, 32, 32))


def test_weights_without_a_description_are_read_with_the_config_beside_them(tmp_path: Path) -> None:
    config = tiny_config()
    run = write_run(tmp_path / "run", config)
    save_file(build(config).state_dict(), run / "weights.safetensors")
    assert read_weights(run / "weights.safetensors")[1] == config.model


def test_weights_that_describe_an_unknown_model_are_one_clear_error(tmp_path: Path) -> None:
    described = tiny_config().model.model_dump_json().replace('"patch_size"', '"patch_length"', 1)
    save_file({"trunk.norm.weight": torch.ones(32)}, tmp_path / "weights.safetensors", {"model": described})
    with pytest.raises(UserError, match=r"another version \(patch_length: Extra inputs"):
        read_weights(tmp_path / "weights.safetensors")


def test_weights_that_do_not_fit_their_model_are_one_clear_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    state, model = read_weights(run / "weights.safetensors")
    narrow = {**state, "trunk.norm.weight": torch.ones(16)}
    for wrong in (narrow, {name: state[name] for name in state if name != "trunk.norm.weight"}):
        write_weights(run / "weights.safetensors", wrong, model)
        with pytest.raises(UserError, match=r"do not fit the model that describes them .*trunk\.norm\.weight"):
            VisualTokenizer.from_run(run)


@pytest.mark.parametrize(
    ("key", "found"), [("generator", "a generator, not a tokenizer"), ("format", "tensors without a model description")]
)
def test_a_file_of_something_else_is_one_clear_error(tmp_path: Path, key: str, found: str) -> None:
    save_file({"trunk.norm.weight": torch.ones(32)}, tmp_path / "weights.safetensors", {key: "{}"})
    with pytest.raises(UserError, match=f"holds {found}: give"):
        VisualTokenizer.from_file(tmp_path / "weights.safetensors")


def test_a_file_that_is_cut_off_or_no_tensors_is_one_clear_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    whole = (run / "weights.safetensors").read_bytes()
    for content in (b"not tensors", whole[: len(whole) // 2]):
        (tmp_path / "weights.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is not a safetensors file, or is cut off"):
            read_weights(tmp_path / "weights.safetensors")


def test_a_gaussian_latent_is_encoded_as_its_mode_and_a_point_has_no_moments() -> None:
    config = tiny_config("model.latent=gaussian")
    tokenizer, images = tokenizer_of(config), random_batch(config, step=0).images[:2]
    latent = tokenizer.encode(images)
    assert latent.shape == (2, 8, 4, 4)
    found = tokenizer.moments(images)
    assert torch.equal(found.mean, latent)
    assert found.log_variance.shape == latent.shape
    assert tokenizer.decode(latent).shape == images.shape
    with pytest.raises(UserError, match="latents are points, without a variance"):
        tokenizer_of(tiny_config()).moments(images)


def test_weights_of_a_masked_run_load_without_what_served_training() -> None:
    config = tiny_config("objectives.rec.mask=[-0.1,0.7]")
    state = build(config).state_dict()
    assert "decoder.mask_token" in state
    tokenizer = VisualTokenizer.from_state(config.model, state)
    assert "decoder.mask_token" not in tokenizer.state_dict()
    public, _ = to_public(state, config.model, 32)
    assert not any("mask_token" in name and name.startswith("pixel_decoder") for name in public)
