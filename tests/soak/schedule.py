"""Which fault comes when: a pure function of the seed.

    faults = schedule(seed=0, ranks=2)
    next(faults)            # Fault(after_seconds=74.2, kind="kill", rank=1, strength=0.31)

A fault comes `after_seconds` of training, counted from the moment in which the run had got over the one before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

LOSING = {
    "kill": "SIGKILL to one rank",
    "stop": "SIGSTOP to one rank, for good",
    "crash": "SIGKILL to every process, the supervisor's too; started again from outside",
    "preempt": "SIGTERM to the supervisor; started again from outside",
    "kill in save": "SIGKILL to one rank while a checkpoint is being written",
    "spoil": "a bit of the newest checkpoint flipped, or a file of it cut off or removed; then SIGKILL to one rank",
}
PASSING = {
    "pause": "SIGSTOP to one rank for up to half of the time after which it counts as lost",
    "full disk": "no file of a rank can grow for some seconds (RLIMIT_FSIZE)",
}
FAULTS = LOSING | PASSING
MEAN_SECONDS = 50.0  # of training between two faults


@dataclass(frozen=True)
class Fault:
    """`strength` in [0, 1): how long, how much, which of several ways; what it means is the kind's own."""

    after_seconds: float
    kind: str
    rank: int
    strength: float

    @property
    def is_losing(self) -> bool:
        """Whether processes end by it."""
        return self.kind in LOSING


def schedule(seed: int, ranks: int, mean_seconds: float = MEAN_SECONDS) -> Iterator[Fault]:
    """Faults without end; any eight in a row, counted from the first, are of all eight kinds."""
    rng = random.Random(seed)
    while True:
        kinds = list(FAULTS)
        rng.shuffle(kinds)
        for kind in kinds:
            yield Fault(rng.uniform(0.4, 1.6) * mean_seconds, kind, rng.randrange(ranks), rng.random())
