"""Following a field from time 0 to time 1: Euler, Heun, and Dormand-Prince with steps of its own choosing.

    euler(lambda x, time: -x, torch.ones(1), grid(100))         # Path(end=[0.3660], evaluations=100); exp(-1) = 0.3679
    heun(lambda x, time: -x, torch.ones(1), grid(50))           # [0.3679], 100
    dopri5(lambda x, time: -x, torch.ones(1), 1e-5, 1e-5)       # [0.3679], 31

Evaluations of the field are what sampling costs, so every solver counts them. Times are numbers of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from configs import UserError

Field = Callable[[Tensor, float], Tensor]
SHORTEST_STEP = 1e-5  # of dopri5
# Dormand and Prince (1980), table 2: stage times, what a stage takes of the slopes before it, fifth order less fourth.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Path(NamedTuple):
    """Where the field led, and how often it was asked."""

    end: Tensor
    evaluations: int


def grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1, t' = s t / (1 + (s - 1) t) of equal ones: below 1 they crowd near 0."""
    times = [step / steps for step in range(steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


def euler(field: Field, x: Tensor, times: list[float]) -> Path:
    """First order: one evaluation a step."""
    for begin, end in pairwise(times):
        x = x + (end - begin) * field(x, begin)
    return Path(x, len(times) - 1)


def heun(field: Field, x: Tensor, times: list[float]) -> Path:
    """Second order: the mean of the slopes at both ends; two evaluations a step."""
    for begin, end in pairwise(times):
        slope = field(x, begin)
        x = x + (end - begin) / 2 * (slope + field(x + (end - begin) * slope, end))
    return Path(x, 2 * (len(times) - 1))


def dopri5(field: Field, x: Tensor, rtol: float, atol: float) -> Path:
    """Fifth order, each step as long as its error, root mean square over the batch in units of atol + rtol |x|, allows.

    All rows share the steps: a row's end depends on its batch within the tolerance. Raises UserError where no step is
    short enough, as with a field that is not finite.
    """
    time, slope, evaluations = 0.0, field(x, 0.0), 1
    step = _first_step(x, slope, rtol, atol)
    while time < 1.0:
        slopes = [slope]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            moved = x + step * _weighted(weights, slopes)
            slopes.append(field(moved, time + node * step))
        evaluations += len(_NODES)
        error = _size(step * _weighted(_ERROR, slopes), atol + rtol * torch.maximum(x.abs(), moved.abs()))
        if error <= 1:  # the last stage is the fifth-order result itself, its slope the next step's first
            time, x, slope = time + step, moved, slopes[-1]
        elif step < SHORTEST_STEP:
            raise UserError(
                f"sampler=dopri5 finds no step short enough at time {time:.4g} (rtol={rtol:g}, atol={atol:g}): it is "
                "held to more than float32 can give, or the generator's output is not finite; raise both, or choose "
                "heun"
            )
        step *= 10.0 if error == 0 else min(10.0, max(0.2, 0.9 * error**-0.2))  # 0.2 where the error is not finite
        if time + step > 1.0 - SHORTEST_STEP:  # no crumb is left for a last step
            step = 1.0 - time
    return Path(x, evaluations)


def _first_step(x: Tensor, slope: Tensor, rtol: float, atol: float) -> float:
    """A hundredth of the time in which the field would change x by its own size (Hairer, Norsett, Wanner II.4)."""
    scale = atol + rtol * x.abs()
    size, speed = _size(x, scale), _size(slope, scale)
    return min(1.0, 0.01 * size / speed) if size > 1e-5 and speed > 1e-5 else 1e-3


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """The sum of weight times slope; zeros are left out."""
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total.add_(slope, alpha=weight)
    return total


def _size(x: Tensor, scale: Tensor) -> float:
    return float((x / scale).square().mean().sqrt())
