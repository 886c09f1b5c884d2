"""Gaussian latents are torch.distributions' Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from model.latent import MAX_LOG_VARIANCE, DiagonalGaussian, mode, moment_channels
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def moments(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 10), -1), ((3, 10, 2, 5), 1), ((1, 1, 2), 2)])
def test_its_kl_is_that_of_torchs_distributions_value_and_gradient(shape: tuple[int, ...], dim: int) -> None:
    ours, theirs = moments(*shape), moments(*shape)
    found = DiagonalGaussian.of(ours, dim).kl()
    mean, log_variance = theirs.chunk(2, dim)
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    # Worst seen 2e-6 relative (sums of up to 25 terms); another factor or sign is off by halves.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_standard_normal_costs_nothing_and_a_draw_is_mean_plus_std_times_e() -> None:
    assert DiagonalGaussian.of(torch.zeros(2, 3, 8), -1).kl().tolist() == [0, 0]
    given = torch.tensor([[[2.0, -1.0, 0.0, 2 * torch.tensor(3.0).log()]]])  # means 2 and -1, deviations 1 and 3
    drawn = DiagonalGaussian.of(given, -1).sample(torch.tensor([[[0.5, -2.0]]]))
    torch.testing.assert_close(drawn, torch.tensor([[[2.5, -7.0]]]))


def test_a_wild_log_variance_stays_finite_and_bf16_stays_bf16() -> None:
    wild = torch.full((1, 1, 4), 1e4, dtype=torch.bfloat16)
    latent = DiagonalGaussian.of(wild, -1)
    assert latent.log_variance.max() == MAX_LOG_VARIANCE
    assert latent.kl().isfinite().all()
    assert latent.kl().dtype == torch.float32
    assert latent.sample(torch.ones(1, 1, 2)).dtype == torch.bfloat16


def test_the_mode_is_the_mean_of_a_gaussian_and_the_whole_of_a_point() -> None:
    point, gaussian = tiny_config().model, tiny_config("model.latent=gaussian").model
    assert (moment_channels(point), moment_channels(gaussian)) == (8, 16)
    given = moments(2, 16, 3, 3)
    assert torch.equal(mode(given, gaussian, dim=1), DiagonalGaussian.of(given, 1).mean)
    assert torch.equal(mode(given[:, :8], point, dim=1), given[:, :8])
