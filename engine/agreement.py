"""What ranks say to each other at the end of a pass, where each has looked at its own samples.

An error of one rank becomes the error of all, so that no rank waits for one that has left:

    with_one_answer(lambda: look_at_everything())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from configs import UserError
from engine import world

T = TypeVar("T")


def with_one_answer(work: Callable[[], T]) -> T:
    """This rank's result of `work`, in which no rank waits for another; a UserError of any rank is raised on all."""
    result, error = None, None
    try:
        result = work()
    except UserError as caught:
        error = str(caught)
    if errors := [text for text in world.gather_objects(error) if text is not None]:
        raise UserError(errors[0])
    return result  # type: ignore[return-value]


def on_first(work: Callable[[], T]) -> T:
    """The first rank's result of `work`, on every rank; so is its UserError."""
    result = with_one_answer(lambda: work() if world.is_first() else None)
    return world.broadcast_object(result)  # type: ignore[return-value]


def trouble_of_first(work: Callable[[], object]) -> str:
    """Run `work` on rank 0; return its OSError or UserError as text on every rank, "" on success. A collective."""
    trouble = ""
    if world.is_first():
        try:
            work()
        except (OSError, UserError) as error:
            trouble = str(error)
    return world.broadcast_object(trouble)


def in_order(values: Tensor, positions: Tensor) -> Tensor:
    """(n, ...) of every rank -> (N, ...) on all, on the CPU, by ascending position: what one rank would have seen."""
    parts = world.gather_objects((values.cpu(), positions.cpu()))
    order = torch.cat([where for _, where in parts]).argsort()
    return torch.cat([part for part, _ in parts])[order]
