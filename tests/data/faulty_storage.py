"""Storage that misbehaves on schedule: late, failing, cut off, gone. The schedule is seeded, so trouble repeats itself.

    schedule = Schedule(seed=1, errors=0.1, latency_seconds=0.001, outages=(Outage("00003.tar", first=20),))
    with faults(schedule) as storage:            # every Shards made inside reads through it
        loader = BatchLoader(config, encoder)
        ...
    storage.num_faults                           # how often it failed a request

A request is opening a shard or reading from it. Requests are counted shard by shard, and which of them fail is a pure
function of (seed, shard, number of the request): what other shards' threads do in between changes nothing.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data import shards, storage
from data.hashing import hash_text, hash_words, uniform


@dataclass(frozen=True)
class Outage:
    """The requests `first` to `last` of the shards whose name ends with `name` fail; "" is every shard.

    `error` ENOENT: the shard is gone; EIO, ESTALE, ETIMEDOUT: it is there and cannot be read.
    """

    name: str
    first: int = 0
    last: int = 2**63
    error: int = errno.ENOENT


@dataclass(frozen=True)
class Schedule:
    """What goes wrong. `errors` and `cuts` are shares of the requests: failing, and giving half of the bytes."""

    seed: int = 0
    latency_seconds: float = 0.0  # on average; a request takes between none and twice as much longer
    errors: float = 0.0
    cuts: float = 0.0
    outages: tuple[Outage, ...] = ()

    def error(self, name: str, number: int) -> int | None:
        """The error of a request, or None."""
        for outage in self.outages:
            if name.endswith(outage.name) and outage.first <= number <= outage.last:
                return outage.error
        return errno.EIO if self._draw(name, number, 1) < self.errors else None

    def wait_seconds(self, name: str, number: int) -> float:
        """How much longer a request takes."""
        return 2 * self.latency_seconds * self._draw(name, number, 2)

    def is_cut(self, name: str, number: int) -> bool:
        """Whether a read gives half of its bytes."""
        return self._draw(name, number, 3) < self.cuts

    def _draw(self, name: str, number: int, purpose: int) -> float:
        return float(uniform(hash_words(self.seed, hash_text(os.path.basename(name)), number, purpose))[0])


class FaultyStorage:
    """`inner`, a data.storage.ShardStorage, with the faults of a schedule. Thread-safe."""

    def __init__(self, inner: storage.ShardStorage, schedule: Schedule) -> None:
        self.inner, self.schedule = inner, schedule
        self.requests: Counter[str] = Counter()  # by shard
        self.num_faults = 0
        self._lock = threading.Lock()

    def fetch(self, name: str) -> Path:
        """As the inner storage; indexes are written and read without faults."""
        return self.inner.fetch(name)

    def is_copied(self, name: str) -> bool:
        """As the inner storage."""
        return self.inner.is_copied(name)

    def forget(self, name: str) -> None:
        """As the inner storage."""
        self.inner.forget(name)

    def open(self, name: str) -> FaultyFile:
        """A request."""
        self.request(name)
        return FaultyFile(self, name, self.inner.open(name))

    def request(self, name: str) -> int:
        """Counts a request, waits, and raises the OSError it meets; gives its number."""
        with self._lock:
            number = self.requests[name]
            self.requests[name] += 1
        time.sleep(self.schedule.wait_seconds(name, number))
        if error := self.schedule.error(name, number):
            self.fault()
            raise OSError(error, os.strerror(error), name)
        return number

    def fault(self) -> None:
        """Counts a request that went wrong."""
        with self._lock:
            self.num_faults += 1


class FaultyFile:
    """An open shard; every read is a request."""

    def __init__(self, faulty: FaultyStorage, name: str, inner: storage.OpenFile) -> None:
        self._faulty, self._name, self._inner = faulty, name, inner

    def read(self, num_bytes: int, offset: int) -> bytes:
        number = self._faulty.request(self._name)
        data = self._inner.read(num_bytes, offset)
        if self._faulty.schedule.is_cut(self._name, number):
            self._faulty.fault()
            return data[: len(data) // 2]
        return data


@contextmanager
def faults(schedule: Schedule) -> Iterator[FaultyStorage]:
    """Inside, corpora that are opened read through a FaultyStorage; several of them share its counts."""
    original = shards.ShardStorage
    faulty = FaultyStorage(original(), schedule)

    def opened(cache_dir: str | Path | None = None) -> FaultyStorage:
        faulty.inner = original(cache_dir)
        return faulty

    shards.ShardStorage = opened  # type: ignore[assignment,misc]
    try:
        yield faulty
    finally:
        shards.ShardStorage = original  # type: ignore[misc]
