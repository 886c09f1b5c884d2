"""PSNR, SSIM and the Fréchet distance against their definitions elsewhere; what was not computed says so."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from configs import UserError
from evaluation.fid import FeatureNetwork, Fid, open_perceptual, quantise, ssim
from evaluation.reconstruction import ExtremePairs, Reconstruction, psnr
from model.losses.perceptual import CONVS_PER_TAP, LpipsDistance

pytestmark = pytest.mark.L0
CPU = torch.device("cpu")


def pair(count: int, side: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images and noisy copies."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    target = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.randn(target.shape, generator=generator) * torch.linspace(0.02, 0.2, count).view(-1, 1, 1, 1)
    return target, (target + noise).clamp(0, 1)


class Means(nn.Module):
    """Features that can be told by hand: six weighted means of an image."""

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[-1] // 2
        return torch.cat([images[..., :half].mean((2, 3)), images[..., half:].square().mean((2, 3))], dim=1)


def network() -> FeatureNetwork:
    return FeatureNetwork(Means(), "means:0, 6-d", 6)


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 4, 4)
    recon = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4)])
    assert psnr(target, recon).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_psnr_and_ssim_are_scikit_images() -> None:
    target, recon = pair(5)
    measured = zip(
        psnr(target, recon).tolist(), ssim(target, recon).tolist(), target.numpy(), recon.numpy(), strict=True
    )
    for our_psnr, our_ssim, a, b in measured:
        assert our_psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4)
        expected = structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert our_ssim == pytest.approx(
            expected, abs=1e-5
        )  # measured 7e-7; a 7 x 7 box window differs by 4e-3 to 9e-2


def test_the_frechet_distance_is_its_formula() -> None:
    (real, fake), fid = pair(40), Fid(network(), CPU)
    for some in range(0, 40, 15):
        fid.add(real[some : some + 15], fake[some : some + 15])
    a, b = (Means()(quantise(x)).double().numpy() for x in (real, fake))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert expected > 1e-5
    assert fid.result() == pytest.approx(expected, rel=1e-5)  # measured 3e-8: the features are float32


def test_the_distance_of_a_set_to_itself_is_nothing_and_of_one_image_an_error() -> None:
    real, _ = pair(30)
    fid = Fid(network(), CPU)
    fid.add(real, real)
    assert abs(fid.result()) < 1e-6
    lonely = Fid(network(), CPU)
    lonely.add(real[:1], real[:1])
    with pytest.raises(UserError, match="two images at least"):
        lonely.result()


def compared(task: Reconstruction, target: Tensor, recon: Tensor) -> Reconstruction:
    for start in range(0, len(target), 4):
        positions = torch.arange(start, min(start + 4, len(target)))
        task.compare(target[positions], recon[positions], positions)
    return task


def test_the_result_holds_the_means_and_names_the_feature_network(tmp_path: Path) -> None:
    target, recon = pair(10)
    outcome = compared(Reconstruction([network()], None, CPU), target, recon).result()
    assert outcome.metrics["psnr_db"] == pytest.approx(float(psnr(target, recon).mean()), rel=1e-6)
    assert outcome.metrics["ssim"] == pytest.approx(float(ssim(target, recon).mean()), rel=1e-6)
    assert outcome.metrics["images"] == 10
    assert isinstance(outcome.metrics["rfid[means:0, 6-d]"], float)
    for name in ("best", "worst"):
        outcome.plots[f"reconstructions_{name}"](tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_what_was_not_computed_says_so_and_is_no_number() -> None:
    figures = compared(Reconstruction([], None, CPU), *pair(3)).result().metrics
    assert figures["lpips"] == "not computed: no weights (--lpips FILE)"
    assert figures["rfid"] == "not computed: no feature network (--fid FILE)"


def test_images_without_a_window_of_ssim_and_no_images_at_all_are_errors_and_no_numbers() -> None:
    with pytest.raises(UserError, match="images of 10 x 10: SSIM compares windows of 11 x 11"):
        compared(Reconstruction([], None, CPU), *pair(2, side=10))
    with pytest.raises(UserError, match="no held-out image could be decoded"):
        Reconstruction([], None, CPU).result()


def test_lpips_is_the_objectives_own_in_signed_space_and_names_its_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    widths, convs = (3, *[4] * 13), {}
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        convs |= {f"convs.{i}.weight": torch.randn(width_out, width_in, 3, 3, generator=generator)}
        convs |= {f"convs.{i}.bias": torch.zeros(width_out)}
    heads = {f"heads.{j}.weight": torch.rand(1, 4, 1, 1, generator=generator) for j in range(len(CONVS_PER_TAP))}
    perceptual, target, recon = LpipsDistance(convs | heads), *pair(6)
    save_file(convs | heads, tmp_path / "lpips.safetensors")
    digest = hashlib.sha256((tmp_path / "lpips.safetensors").read_bytes()).hexdigest()
    network = open_perceptual(tmp_path / "lpips.safetensors", "--lpips")
    figures = compared(Reconstruction([], network, CPU), target, recon).result().metrics
    expected = float(perceptual(2 * recon - 1, 2 * target - 1).mean())
    assert expected > 0
    assert figures[f"lpips[vgg16:{digest[:6]}]"] == pytest.approx(expected, rel=1e-4)
    assert "lpips" not in figures, "a figure without its network's name"


def test_psnr_says_what_the_mean_colour_would_reach() -> None:
    target = torch.cat([torch.zeros(1, 3, 8, 16), torch.ones(1, 3, 8, 16)], dim=2)  # half black, half white
    figures = compared(Reconstruction([], None, CPU), target, target.clamp(0.1, 0.9)).result().metrics
    assert figures["psnr_db"] == pytest.approx(20.0, abs=1e-4)
    assert figures["psnr_db_of_mean_colour"] == pytest.approx(-20 * math.log10(0.5), abs=1e-4)


@pytest.mark.parametrize("is_largest", [False, True])
def test_the_extremes_of_all_batches_are_kept_in_order(is_largest: bool) -> None:
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0])
    target = (values / 10).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    kept = ExtremePairs(3, is_largest)
    for part in (slice(0, 2), slice(2, 5), slice(5, 7)):
        kept.add(values[part], target[part], 1 - target[part])
    shown = kept.gather()
    expected = [0.9, 0.8, 0.7] if is_largest else [0.1, 0.2, 0.3]
    assert (shown[:, 0, 0, 0, 0].float() / 255).tolist() == pytest.approx(expected, abs=0.002)
    assert (shown[:, 1, 0, 0, 0].float() / 255).tolist() == pytest.approx([1 - x for x in expected], abs=0.002)
