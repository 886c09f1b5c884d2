"""The two alignment losses against numbers computed by hand, and what their margins leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.losses.alignment import alignment_cosine_loss, alignment_distance_loss

pytestmark = pytest.mark.L0


def at(*degrees: float) -> Tensor:
    """(1, P, 2): a vector of length 3 at each angle."""
    angles = torch.tensor(degrees).deg2rad()
    return 3 * torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(0)


def test_the_cosine_loss_is_what_hand_and_pencil_say() -> None:
    projected, feature = at(0, 60, 90), at(0, 0, 0)  # cosines 1, 1/2, 0
    assert alignment_cosine_loss(projected, feature, margin=0.0).item() == pytest.approx((0 + 0.5 + 1) / 3, abs=1e-6)
    assert alignment_cosine_loss(projected, feature, margin=0.25).item() == pytest.approx(
        (0 + 0.25 + 0.75) / 3, abs=1e-6
    )
    assert alignment_cosine_loss(projected, 7 * feature, margin=1.0).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_loss_is_what_hand_and_pencil_say() -> None:
    """Two patches 60 degrees apart in latents and 90 in features: cosines 1/2 and 0, of two ordered pairs of four."""
    latent, feature = at(10, 70), at(0, 90)
    assert alignment_distance_loss(latent, feature, margin=0.0).item() == pytest.approx(2 * 0.5 / 4, abs=1e-6)
    assert alignment_distance_loss(latent, feature, margin=0.2).item() == pytest.approx(2 * 0.3 / 4, abs=1e-6)
    assert alignment_distance_loss(feature, latent, margin=0.2).item() == pytest.approx(2 * 0.3 / 4, abs=1e-6)


def test_patches_are_compared_within_their_image_only() -> None:
    one, other = at(0, 90), at(0, 30)
    both = alignment_distance_loss(torch.cat((one, other)), torch.cat((other, one)), 0.0)
    assert both.item() == pytest.approx(2 * math.cos(math.radians(30)) / 4, abs=1e-6)


def test_features_may_be_wider_than_latents_and_turned_as_a_whole() -> None:
    latent = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
    assert alignment_distance_loss(latent, latent @ turn.T, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert alignment_distance_loss(latent, torch.randn(2, 5, 8), 0.0).item() > 0.05


def test_within_the_margins_there_is_no_gradient_and_beyond_them_there_is() -> None:
    latent, feature = at(0, 50).requires_grad_(), at(10, 70)  # cosines 0.98, 0.94; of the pair 0.64 and 0.5
    inside = alignment_cosine_loss(latent, feature, margin=0.1) + alignment_distance_loss(latent, feature, margin=0.2)
    [gradient] = torch.autograd.grad(inside, latent)
    assert inside.item() == 0
    assert not gradient.any()
    for beyond in (
        alignment_cosine_loss(latent, feature, margin=0.03),
        alignment_distance_loss(latent, feature, margin=0.1),
    ):
        [gradient] = torch.autograd.grad(beyond, latent)
        assert gradient.any()
