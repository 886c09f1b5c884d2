"""The adversarial losses against their formulas, the adaptive weight against plain autograd on the weight."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.alignment import NORM_EPS, adaptive_weight
from model.losses.comm import Comm, Solo
from model.losses.gan import discriminator_loss, generator_loss
from tests.harness import run_ranks

REAL = torch.tensor([2.0, 0.5, -1.0, 0.0]).reshape(1, 1, 2, 2)
FAKE = torch.tensor([-3.0, -0.5, 1.0, 0.0]).reshape(1, 1, 2, 2)


@pytest.mark.L0
def test_hinge_asks_for_a_margin_of_one_and_no_more() -> None:
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(
        0.5 * (0 + 0.5 + 2 + 1 + 0 + 0.5 + 2 + 1) / 4
    )
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(2.5 / 4)
    sure = torch.full_like(REAL, 1.5).requires_grad_()
    [grad] = torch.autograd.grad(discriminator_loss(sure, -sure.detach(), "hinge"), sure)
    assert not grad.any()


@pytest.mark.L0
def test_vanilla_is_the_cross_entropy_and_does_not_saturate_for_the_decoder() -> None:
    expected = 0.5 * (
        F.binary_cross_entropy_with_logits(REAL, torch.ones_like(REAL))
        + F.binary_cross_entropy_with_logits(FAKE, torch.zeros_like(FAKE))
    )
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "vanilla"), expected)
    assert generator_loss(torch.zeros(1, 1, 1, 1), "vanilla").item() == pytest.approx(math.log(2))
    unmasked = torch.tensor([-20.0]).requires_grad_()
    [grad] = torch.autograd.grad(generator_loss(unmasked.reshape(1, 1, 1, 1), "vanilla"), unmasked)
    assert grad.item() == pytest.approx(-1.0), "a decoder that is seen through is told so in full"


def losses(output_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Two unlike losses; means over rows, as both are in a step."""
    return output_TF.abs().mean(), torch.sigmoid(output_TF * torch.arange(output_TF.shape[1])).mean()


def example(rows: int) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(8, 12), torch.randn(rows, 8)


def by_autograd(layer: nn.Linear, tokens_TD: Tensor) -> float:
    norms = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses(layer(tokens_TD))]
    return (norms[0] / (norms[1] + NORM_EPS)).item()


def by_output(layer: nn.Linear, tokens_TD: Tensor, comm: Comm, limit: float = 1e4) -> float:
    output_TF = layer(tokens_TD).detach().requires_grad_()
    of_pixels, of_gan = (torch.autograd.grad(loss, output_TF)[0] for loss in losses(output_TF))
    return adaptive_weight(of_pixels, of_gan, tokens_TD, comm, limit).item()


@pytest.mark.L0
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_adaptive_weight_is_that_of_autograd_on_the_layers_own_weight(rows: int) -> None:
    """Worst seen 1e-7 relative; a norm of the outputs' gradients without the tokens is tens of percents off."""
    layer, tokens_TD = example(rows)
    assert by_output(layer, tokens_TD, Solo()) == pytest.approx(by_autograd(layer, tokens_TD), rel=1e-6)


@pytest.mark.L0
def test_it_is_bounded_where_the_discriminator_says_nothing() -> None:
    grad, tokens_TD = torch.ones(3, 4), torch.ones(3, 2)
    assert adaptive_weight(grad, torch.zeros(3, 4), tokens_TD, Solo(), limit=50.0).item() == 50.0
    assert adaptive_weight(torch.zeros(3, 4), grad, tokens_TD, Solo(), limit=50.0).item() == 0.0


def on_its_rows(comm: Comm, rows: int) -> float:
    layer, tokens_TD = example(rows)
    return by_output(layer, tokens_TD[comm.rank :: comm.world_size], comm)


@pytest.mark.L1
def test_two_ranks_get_the_weight_of_the_whole_batch_and_the_same_one() -> None:
    """Worst seen 1e-7 relative. The mean of the ranks' own ratios is several percents off."""
    layer, tokens_TD = example(6)
    found = run_ranks(on_its_rows, 2, 6)
    assert found[0] == found[1] == pytest.approx(by_autograd(layer, tokens_TD), rel=1e-6)
    own = [by_autograd(layer, tokens_TD[rank::2]) for rank in range(2)]
    assert sum(own) / 2 != pytest.approx(found[0], rel=1e-2)
