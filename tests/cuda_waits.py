"""What makes the host wait for CUDA, by who asked: torch's sync debug mode, and the calls that it does not see.

with waits_of_host() as waits:
    train_step(...)
assert waits == []                   # else: ["nonzero ... in engine/step.py:train_step"]
with sync_debug_mode("error"):
    x @ x
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tests.stream_stand_in import asker

PROTOTYPE = "Synchronization debug mode is a prototype"  # what torch warns of whenever the mode is set


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """Inside, torch warns of a wait ("warn") or raises ("error"); then the mode is what it was, whatever happened."""
    before = torch.cuda.get_sync_debug_mode()
    _set(mode)
    try:
        yield
    finally:
        _set(before)


def _set(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PROTOTYPE)
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def waits_of_host() -> Iterator[list[str]]:
    """Collects who makes the host wait: copies, reads and shapes by their warnings, calls of synchronize by name (some
    of which are warned of as well)."""
    waits: list[str] = []

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def waiting(*arguments: Any, **options: Any) -> Any:
            waits.append(f"{name} in {asker(__file__)}")
            return call(*arguments, **options)

        return waiting

    with ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.callback(setattr, owner, "synchronize", owner.synchronize)
            owner.synchronize = counted(owner.synchronize, owner.__name__)  # type: ignore[attr-defined]
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        with sync_debug_mode("warn"):
            yield waits
    for warning in caught:
        if "synchronizing" in str(warning.message):
            place = "/".join(warning.filename.split("/")[-2:])
            waits.append(f"{warning.message} in {place}:{warning.lineno}")
