"""Solvers on fields whose answer is known, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from configs import UserError
from model.generator import flow_matching

pytestmark = pytest.mark.L0
START = torch.tensor([1.0, -2.0], dtype=torch.float64)


class Turning:
    """x' = (1 + 2 time) A x with A a turn and a decay: x(1) = expm(2 A) x(0), as 2 is the integral of 1 + 2 time."""

    A = torch.tensor([[-0.3, -1.0], [1.0, -0.3]], dtype=torch.float64)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, time: float) -> Tensor:
        self.calls += 1
        return (1 + 2 * time) * (self.A.to(x.dtype) @ x)

    @property
    def end(self) -> Tensor:
        return torch.linalg.matrix_exp(2 * self.A) @ START


def gap(path: flow_matching.OdeSolution) -> float:
    return (path.end - Turning().end).abs().max().item()


# Measured: 6.0e-3 (euler), 1.4e-5 (heun), 1.1e-6 (dopri5, 85 evaluations).
@pytest.mark.parametrize(("name", "within"), [("euler", 1e-2), ("heun", 3e-5), ("dopri5", 3e-6)])
def test_a_solver_agrees_with_the_matrix_exponential(name: str, within: float) -> None:
    field = Turning()
    if name == "dopri5":
        path = flow_matching.dopri5(field, START, rtol=1e-6, atol=1e-6)
    else:
        path = getattr(flow_matching, name)(field, START, flow_matching.time_grid(400))
    assert gap(path) < within
    assert path.evaluations == field.calls


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_steps_divides_the_error_by_the_power_of_the_order(name: str, order: int) -> None:
    coarse, fine = (
        gap(getattr(flow_matching, name)(Turning(), START, flow_matching.time_grid(steps))) for steps in (100, 200)
    )
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_dopri5_takes_more_evaluations_the_less_error_is_allowed() -> None:
    paths = [flow_matching.dopri5(Turning(), START, tolerance, tolerance) for tolerance in (1e-3, 1e-6, 1e-9)]
    assert sorted(path.evaluations for path in paths) == [path.evaluations for path in paths]
    assert [gap(path) for path in paths] == sorted((gap(path) for path in paths), reverse=True)
    assert gap(paths[-1]) < 1e-8


def test_dopri5_needs_few_evaluations_where_the_field_is_straight_and_more_at_a_bend() -> None:
    straight = flow_matching.dopri5(lambda x, time: torch.ones_like(x), torch.zeros(3), 1e-5, 1e-5)
    bent = flow_matching.dopri5(lambda x, time: 50 * torch.cos(x * 0 + 50 * time), torch.zeros(3), 1e-5, 1e-5)
    assert straight.evaluations < 40 < bent.evaluations
    torch.testing.assert_close(straight.end, torch.ones(3))
    torch.testing.assert_close(bent.end, torch.full((3,), math.sin(50.0)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_field_that_is_not_finite_ends_in_an_error(value: float) -> None:
    """And soon: a generator's evaluations are not free."""
    asked: list[float] = []

    def field(x: Tensor, time: float) -> Tensor:
        asked.append(time)
        return torch.full_like(x, value)

    with pytest.raises(UserError, match=r"sampler=dopri5 finds no step short enough at time 0 .* not finite"):
        flow_matching.dopri5(field, torch.zeros(2), 1e-3, 1e-6)
    assert len(asked) < 50


def test_a_field_that_breaks_on_the_way_ends_in_an_error_there() -> None:
    with pytest.raises(UserError, match=r"no step short enough at time 0\.5"):
        flow_matching.dopri5(lambda x, time: x / (time < 0.5), torch.ones(2), 1e-3, 1e-6)


def test_a_shift_below_one_crowds_the_times_near_the_noise() -> None:
    assert flow_matching.time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert flow_matching.time_grid(2, shift=0.5) == pytest.approx([0, 1 / 3, 1])
    assert flow_matching.time_grid(2, shift=2.0) == pytest.approx([0, 2 / 3, 1])
    assert (
        max(
            b - a
            for a, b in zip(flow_matching.time_grid(250, 0.075), flow_matching.time_grid(250, 0.075)[1:], strict=False)
        )
        < 0.06
    )
