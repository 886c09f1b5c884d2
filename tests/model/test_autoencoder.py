"""The tokenizer in the place of diffusers' AutoencoderKL, used as its pipelines use that."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from configs import UserError
from model.autoencoder import Autoencoder
from model.tokenizer import VisualTokenizer
from tests.model.tiny_weights import tokenizer_of, write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 8, 1, 1, generator=generator)
    return Autoencoder(tokenizer_of(tiny_config()), mean, torch.rand(1, 8, 1, 1, generator=generator) + 0.5)


def text_to_image(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """The end of a latent diffusion pipeline: how it finds sizes, undoes the normalisation and reads the pixels."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
    image = vae.decode(latents.to(vae.dtype), return_dict=False, generator=None)[0]
    assert image.shape[-1] == latents.shape[-1] * scale
    return (image / 2 + 0.5).clamp(0, 1)


def image_to_image(vae: Autoencoder, image: torch.Tensor) -> torch.Tensor:
    """The start of one: latents of an image, normalised."""
    image = image.to(device=vae.device, dtype=vae.dtype)
    latents = vae.encode(image).latent_dist.sample(torch.Generator().manual_seed(3))
    return (latents - vae.config["shift_factor"]) * vae.config.get("scaling_factor", 1.0)


def test_a_pipeline_gets_the_tokenizers_own_latents_and_pixels(vae: Autoencoder) -> None:
    image = torch.rand(2, 3, 32, 48)
    latent = vae.tokenizer.encode(image)
    normalised = image_to_image(vae, image * 2 - 1)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    # Worst seen 0 and 2.4e-7 (the normalisation there and back). A wrong range or shift is off by tenths.
    torch.testing.assert_close(normalised, (latent - shift) * scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(text_to_image(vae, normalised), vae.tokenizer.decode(latent), rtol=0, atol=1e-6)
    assert vae.decode(latent).sample.min() >= -1


def test_the_distribution_has_one_value(vae: Autoencoder) -> None:
    found = vae.encode(torch.rand(1, 3, 32, 32)).latent_dist
    assert torch.equal(found.mode(), found.sample())
    assert torch.equal(found.mode(), found.mean)
    assert not found.std.any()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(vae(image).sample, vae.decode(vae.encode(image, return_dict=False)[0].mode()).sample)


def test_a_gaussian_distribution_is_drawn_with_the_generator() -> None:
    vae = Autoencoder(tokenizer_of(tiny_config("model.latent=gaussian")))
    image = torch.rand(2, 3, 32, 32)
    found = vae.encode(image * 2 - 1).latent_dist
    assert torch.equal(found.mode(), vae.tokenizer.encode(image))
    drawn = found.sample(torch.Generator().manual_seed(3))
    assert torch.equal(drawn, found.sample(torch.Generator().manual_seed(3)))
    normals = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, found.mean + found.std * normals)
    torch.manual_seed(3)
    assert torch.equal(found.sample(), drawn)
    torch.testing.assert_close(found.std, vae.tokenizer.moments(image).std)
    assert vae.to(torch.bfloat16).encode(image).latent_dist.sample().dtype == torch.bfloat16


def test_pooled_statistics_make_latents_of_unit_deviation() -> None:
    tokenizer = tokenizer_of(tiny_config())
    latent = tokenizer.encode(torch.rand(4, 3, 32, 32))
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3), unbiased=False)
    config = Autoencoder(tokenizer, mean, std).config
    normalised = (latent - config.shift_factor) * config.scaling_factor
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert config.latents_mean == pytest.approx(mean.tolist())
    assert config.latents_std == pytest.approx(std.tolist())


def test_without_statistics_nothing_is_scaled_and_bf16_pipelines_get_bf16() -> None:
    vae = Autoencoder(tokenizer_of(tiny_config())).to(torch.bfloat16)
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.latents_mean) == (1.0, 0.0, None)
    assert vae.dtype == torch.bfloat16
    latent = image_to_image(vae, torch.rand(1, 3, 32, 32))
    assert latent.dtype == text_to_image(vae, latent.float()).dtype == torch.bfloat16


def test_it_loads_a_directory_with_its_statistics_and_says_what_is_wrong_with_them(tmp_path: Path) -> None:

    VisualTokenizer.from_run(write_run(tmp_path / "run", tiny_config())).save_pretrained(tmp_path / "public")
    stats = tmp_path / "latents_stats.pt"
    torch.save({"mean": torch.zeros(1, 8, 1, 1), "std": torch.full((1, 8, 1, 1), 2.0)}, stats)
    vae = Autoencoder.from_pretrained(tmp_path / "public", stats=stats)
    assert (vae.config.scaling_factor, vae.config.sample_size) == (0.5, 32)
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, stats)
    with pytest.raises(UserError, match="hold 4 means, the latents have 8 channels"):
        Autoencoder.from_pretrained(tmp_path / "public", stats=stats)
    whole = stats.read_bytes()
    form = "they are a dictionary of the tensors mean and std, L numbers each, as torch.save writes one"
    damage = "holds no latent statistics, is cut off, or holds more than tensors"
    for content, says in (
        (b"", damage), (b"no torch file", damage), (whole[:-10], damage), (saved(tmp_path), damage),
        (saved({"mean": torch.zeros(8)}), "holds no latent statistics but the keys ['mean']"),
        (saved({"mean": 1.0, "std": 2.0}), "holds no latent statistics but the keys ['mean', 'std']"),
        (saved(torch.zeros(8)), "holds no latent statistics but a Tensor"),
    ):  # fmt: skip
        stats.write_bytes(content)
        with pytest.raises(UserError) as caught:
            Autoencoder.from_pretrained(tmp_path / "public", stats=stats)
        assert str(caught.value) == f"{stats} {says}: {form}"
    with pytest.raises(UserError, match=r"none\.pt cannot be read \(No such file or directory\): stats names"):
        Autoencoder.from_pretrained(tmp_path / "public", stats=tmp_path / "none.pt")


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_patch_that_is_no_power_of_two_is_refused() -> None:
    sizes = ("views.image_size=36", "views.global_size=36", "views.local_size=24")
    with pytest.raises(UserError, match="a patch of 12 pixels"):
        Autoencoder(tokenizer_of(tiny_config("model.patch_size=12", *sizes)))
