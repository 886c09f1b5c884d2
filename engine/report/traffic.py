"""Bytes that collectives move, counted as they are called: integers on the host, no device is asked.

    with counting() as traffic:
        train_step(...)
    traffic.bytes["all_gather"], traffic.calls["all_gather"]          # 579272, 107

A message is counted as the whole tensor, the convention of NCCL's own tests: the output of an all-gather, the input of
a reduce-scatter, the tensor of an all-reduce. What a rank sends is less or more; profiling/cost/communication.py has
the factors. Pickled objects (data health at reports) are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine import world, zero

REPORTED = ("all_gather", "reduce_scatter", "all_reduce")


@dataclass
class Traffic:
    """What this rank's collectives moved since the last `take`, by kind."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, num_bytes: int) -> None:
        """Counts one call; for zero.observed and world.observed."""
        self.bytes[kind] += num_bytes
        self.calls[kind] += 1

    def take(self, num_steps: int) -> dict[str, float]:
        """MB (10^6 bytes) a step under the report's names, and a new start."""
        values = {f"comm/{kind}_mb": self.bytes[kind] / num_steps / 1e6 for kind in REPORTED}
        self.bytes.clear()
        self.calls.clear()
        return values


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts inside. Enter after the engine is built: DeepSpeed must have its backend."""
    traffic = Traffic()
    with world.observed(traffic.note), zero.observed(traffic.note):
        yield traffic
