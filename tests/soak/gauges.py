"""Memory, open files and threads of every process of a run, looked at every second.

with Gauges(mark) as gauges:
    ...
gauges.lives                       # [Life(pid=1234, role="rank 0", readings=[Reading(3.0, 611.0, 41, 19), ...])]
slope(life.readings)               # MiB a minute, by Theil and Sen: half of all pairs rise faster
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.soak.processes import marked, use_of

EVERY_SECONDS = 1.0
MOST_PAIRED = 300  # readings; all pairs of more would take seconds


class Reading(NamedTuple):
    """`seconds` since the gauges began."""

    seconds: float
    rss_mib: float
    num_files: int
    num_threads: int


@dataclass
class Life:
    """One process, from when it was first seen to when it was last."""

    pid: int
    role: str
    readings: list[Reading] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.readings[-1].seconds - self.readings[0].seconds

    def after(self, seconds: float) -> list[Reading]:
        """The readings from so long after the first one."""
        start = self.readings[0].seconds + seconds
        return [reading for reading in self.readings if reading.seconds >= start]


class Gauges:
    """Reads in a thread of its own."""

    def __init__(self, mark: str) -> None:
        self._mark, self._began = mark, time.monotonic()
        self._by_pid: dict[tuple[int, str], Life] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="gauges", daemon=True)

    def __enter__(self) -> Gauges:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def lives(self) -> list[Life]:
        return list(self._by_pid.values())

    def _read(self) -> None:
        while not self._is_over.wait(EVERY_SECONDS):
            for pid in marked(self._mark):
                with suppress(OSError):  # it ended meanwhile
                    use = use_of(pid)
                    life = self._by_pid.setdefault((pid, use.role), Life(pid, use.role))
                    now = time.monotonic() - self._began
                    life.readings.append(Reading(now, use.rss_mib, use.num_files, use.num_threads))


def slope(readings: Sequence[Reading]) -> float:
    """MiB a minute: the median slope of all pairs, which a few outliers do not move. 0 for fewer than two."""
    some = readings[:: -(-len(readings) // MOST_PAIRED)] if readings else readings
    pairs = [
        (later.rss_mib - one.rss_mib) / (later.seconds - one.seconds)
        for i, one in enumerate(some)
        for later in some[i + 1 :]
    ]
    return 60 * statistics.median(pairs) if pairs else 0.0
