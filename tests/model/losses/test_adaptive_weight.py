"""Two losses weighed where their gradients meet: what autograd gives, asked for each of them by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.losses.alignment import MAX_RATIO, NORM_EPS, AdaptiveBalance, adaptive_weight, balance_gradients
from model.losses.comm import Solo

pytestmark = pytest.mark.L0


class Problem:
    """A linear layer, and two losses of what leaves it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.input_ND = torch.randn(6, 5, generator=generator, requires_grad=True)
        self.layer = nn.Linear(5, 3, bias=False)
        nn.init.normal_(self.layer.weight, generator=generator)

    @staticmethod
    def main(latent_NL: Tensor) -> Tensor:
        return latent_NL.pow(3).mean()

    @staticmethod
    def other(latent_NL: Tensor) -> Tensor:
        return latent_NL.sin().sum()

    def gradient(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.input_ND, self.layer.weight), retain_graph=True)

    def ratio(self, limit: float = MAX_RATIO) -> Tensor:
        latent = self.layer(self.input_ND)
        [main] = torch.autograd.grad(self.main(latent), latent, retain_graph=True)
        [other] = torch.autograd.grad(self.other(latent), latent)
        return adaptive_weight(main, other, self.input_ND, Solo(), limit)


def test_the_ratio_is_that_of_the_norms_of_the_layers_weight_gradients() -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    norms = [torch.linalg.vector_norm(problem.gradient(loss(latent))[1]) for loss in (problem.main, problem.other)]
    torch.testing.assert_close(problem.ratio(), norms[0] / (norms[1] + NORM_EPS))
    assert problem.ratio(limit=1e-3).item() == pytest.approx(1e-3)


@pytest.mark.parametrize(("weight", "scale"), [(0.1, 1.0), (0.1, 0.25), (2.0, 7.0)])
def test_one_backward_gives_the_gradient_of_the_published_two(weight: float, scale: float) -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    main, other = problem.main(latent), problem.other(latent)
    ratio = problem.ratio()
    expected = problem.gradient(scale * (main + weight * ratio * other))

    to_main, to_other = balance_gradients(latent, problem.input_ND.detach(), AdaptiveBalance(weight, scale, Solo()))
    found = problem.gradient(scale * (problem.main(to_main) + weight * problem.other(to_other)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)  # float32: worst 2e-7 relative
    assert 0.01 < ratio < 100
    assert abs(ratio - 1) > 0.1, "else the ratio could be left out and nobody would see"


def test_the_share_of_the_other_loss_does_not_depend_on_its_scale() -> None:
    """But for the published 1e-4 beside its norm."""
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    found = []
    for factor in (1.0, 1000.0):
        to_main, to_other = balance_gradients(latent, problem.input_ND.detach(), AdaptiveBalance(0.5, 1.0, Solo()))
        found.append(problem.gradient(problem.main(to_main) + 0.5 * factor * problem.other(to_other))[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_a_loss_without_gradient_adds_none() -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    to_main, to_other = balance_gradients(latent, problem.input_ND.detach(), AdaptiveBalance(0.1, 1.0, Solo()))
    found = problem.gradient(problem.main(to_main) + 0.1 * (0 * to_other).sum())
    for mine, theirs in zip(found, problem.gradient(problem.main(latent)), strict=True):
        assert torch.equal(mine, theirs)
