"""Two losses weighed where their gradients meet: what autograd gives, asked for each of them by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.objectives.balance import EPS, LARGEST, Balance, adaptive_weight, balanced, weight_gradient
from model.objectives.comm import Solo

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


def test_a_layers_weight_gradient_is_the_product_of_its_two_activations() -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    [at_latent, at_weight] = torch.autograd.grad(problem.main(latent), (latent, problem.layer.weight))
    torch.testing.assert_close(weight_gradient(problem.input_ND, at_latent), at_weight)


@pytest.mark.parametrize(("weight", "scale"), [(0.1, 1.0), (0.1, 0.25), (2.0, 7.0)])
def test_one_backward_gives_the_gradient_of_the_published_two(weight: float, scale: float) -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    main, other = problem.main(latent), problem.other(latent)
    ratio = adaptive_weight(problem.gradient(main)[1], problem.gradient(other)[1])
    expected = problem.gradient(scale * (main + weight * ratio * other))

    to_main, to_other = balanced(latent, problem.input_ND.detach(), Balance(weight, scale, Solo()))
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
        to_main, to_other = balanced(latent, problem.input_ND.detach(), Balance(0.5, 1.0, Solo()))
        found.append(problem.gradient(problem.main(to_main) + 0.5 * factor * problem.other(to_other))[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_a_loss_without_gradient_adds_none_and_the_ratio_has_a_ceiling() -> None:
    problem = Problem()
    latent = problem.layer(problem.input_ND)
    to_main, to_other = balanced(latent, problem.input_ND.detach(), Balance(0.1, 1.0, Solo()))
    found = problem.gradient(problem.main(to_main) + 0.1 * (0 * to_other).sum())
    for mine, theirs in zip(found, problem.gradient(problem.main(latent)), strict=True):
        assert torch.equal(mine, theirs)
    assert adaptive_weight(torch.tensor([2.0]), torch.tensor([0.0])) == pytest.approx(2 / EPS)
    assert adaptive_weight(torch.tensor([1e6]), torch.tensor([0.0])) == LARGEST
