"""The straight path: which end is noise, and what a prediction costs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from configs.generator import TimeDistribution
from model.generator.flow_matching import interpolate, sample_times, velocity_terms

pytestmark = pytest.mark.L0


def test_time_zero_is_noise_and_time_one_the_latent() -> None:
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    x = interpolate(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[1], latents[1])
    torch.testing.assert_close(x[2], 0.75 * noise[2] + 0.25 * latents[2])


def test_the_loss_of_a_case_by_hand() -> None:
    """One place, two channels: latent (3, 1), noise (0, -3), so velocity (3, 4); predicted (3, 0).

    Square: (0 + 16) / 2 = 8. Angle: cos = 9 / (3 * 5) = 0.6, so 0.4.
    """
    latents, noise = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.tensor([0.0, -3.0]).view(1, 2, 1, 1)
    predicted = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
    terms = velocity_terms(predicted, latents, noise, direction=0.5)
    assert {name: round(term.item(), 5) for name, term in terms.items()} == {
        "total": 8.2,
        "velocity": 8.0,
        "direction": 0.4,
    }


def test_without_weight_there_is_no_direction_term() -> None:
    terms = velocity_terms(torch.zeros(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), direction=0.0)
    assert set(terms) == {"total", "velocity"}
    assert terms["total"] is terms["velocity"]


def test_zeros_cost_one_in_direction_and_have_a_gradient_that_leaves_the_velocitys_alone() -> None:
    """At the customary shortest length of 1e-8 the ratio of the two gradients is above 1e8; at ours it is 1,600."""
    predicted = torch.zeros(4, 16, 2, 2, requires_grad=True)
    terms = velocity_terms(predicted, torch.randn(4, 16, 2, 2), torch.randn(4, 16, 2, 2), direction=1.0)
    assert terms["direction"].item() == 1.0
    of_velocity, of_direction = (
        torch.autograd.grad(terms[name], predicted, retain_graph=True)[0].norm() for name in ("velocity", "direction")
    )
    assert of_direction < 3000 * of_velocity


def test_logit_normal_times_have_a_normal_logit() -> None:
    """200,000 equally spaced shares of the distribution; its mean and deviation to 1e-3."""
    uniform = (torch.arange(200_000) + 0.5) / 200_000
    logits = torch.logit(sample_times(uniform, TimeDistribution(mean=-0.5, std=1.25)).double())
    assert logits.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.25, abs=1e-3)
    assert torch.equal(sample_times(uniform, TimeDistribution(kind="uniform")), uniform)


def test_half_of_the_standard_logit_normal_times_lie_below_the_middle() -> None:
    times = sample_times(torch.tensor([0.5, 0.8413447]), TimeDistribution())
    torch.testing.assert_close(times, torch.tensor([0.5, 1 / (1 + math.exp(-1))]))


def test_the_total_is_the_sum_of_its_terms_and_differentiable() -> None:
    predicted = torch.randn(5, 3, 4, 4, requires_grad=True)
    latents, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    terms = velocity_terms(predicted, latents, noise, direction=2.0)
    angle = 1 - F.normalize(predicted, dim=1).mul(F.normalize(latents - noise, dim=1)).sum(1).mean()
    expected = (predicted - (latents - noise)).square().mean() + 2 * angle
    torch.testing.assert_close(terms["total"], expected)
    ours, theirs = (torch.autograd.grad(loss, predicted)[0] for loss in (terms["total"], expected))
    torch.testing.assert_close(ours, theirs)
