"""Making batches ahead of the step, on one background thread.

batches = Prefetcher(loader.batch, start=1000, depth=2)  # batches 1000 and 1001 are being made already
for batch in batches: ...
batches.wait_seconds                                     # how long the loop stood still
batches.close()
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Raised:
    error: BaseException


class Prefetcher(Generic[Item]):
    """Iterates make(start), make(start + 1), ... without end, at most `depth` items ahead.

    What `make` raises is raised to the consumer, in its place in the sequence, and ends the iteration.
    """

    def __init__(self, make: Callable[[int], Item], start: int, depth: int) -> None:
        self.wait_seconds = 0.0
        self._make = make
        self._made: queue.SimpleQueue[Item | _Raised] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        start = time.perf_counter()
        item = self._made.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, _Raised):
            self._made.put(item)  # asked again, it answers the same
            raise item.error
        self._room.release()
        return item

    def close(self) -> None:
        """Ends the thread after the item it is making; `next` gives what is made, then stops."""
        self._closed.set()
        self._room.release()
        self._thread.join()
        self._made.put(_Raised(StopIteration()))

    def _run(self, number: int) -> None:
        try:
            while self._wanted():
                self._made.put(self._make(number))
                number += 1
        except BaseException as error:  # whatever it is, the consumer has to hear of it
            self._made.put(_Raised(error))

    def _wanted(self) -> bool:
        self._room.acquire()
        return not self._closed.is_set()


class Ahead(Generic[Item]):
    """One Prefetcher at a time over `make`, as loaders offer it; closing it twice, or before it began, is no error."""

    def __init__(self, make: Callable[[int], Item], depth: int) -> None:
        self._make, self._depth = make, depth
        self._prefetcher: Prefetcher[Item] | None = None

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer waited since this was last read."""
        if self._prefetcher is None:
            return 0.0
        waited, self._prefetcher.wait_seconds = self._prefetcher.wait_seconds, 0.0
        return waited

    def iterate(self, start: int) -> Prefetcher[Item]:
        """make(start), make(start + 1), ...; the iteration before this one ends."""
        self.close()
        self._prefetcher = Prefetcher(self._make, start, self._depth)
        return self._prefetcher

    def close(self) -> None:
        """Ends the thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()
