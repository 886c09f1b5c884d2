"""Map a function over items in several processes: results in order, with a bounded number in memory.

    for image in map_in_order(load, names, workers=8):       # yields as map(load, names) does
        ...

Processes are spawned, not forked: the caller may have threads (torch, tokenizers). They ignore interrupts, which the
caller handles, and end when the caller closes the iterator.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
NUM_CORES = len(os.sched_getaffinity(0))  # usable by this process


def map_in_order(function: Callable[[T], R], items: Sequence[T], workers: int, chunk: int = 8) -> Iterator[R]:
    """Yield function(item) of each item, in order, `chunk` items a task. Raises OSError where a process dies."""
    if workers == 1:
        yield from map(function, items)
        return
    starts = iter(range(0, len(items), chunk))
    waiting: deque[Future[list[R]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _initialise_worker)

    def submit(most: int) -> None:
        while len(waiting) < most and (start := next(starts, None)) is not None:
            waiting.append(pool.submit(_map_chunk, function, items[start : start + chunk]))

    try:
        with _children_ignore_interrupts():
            submit(workers)  # starts all processes
        while waiting:
            submit(2 * workers)
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process died: it was killed, ran out of memory, or crashed on a file; see the system log, and "
            "run again with fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _map_chunk(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _initialise_worker() -> None:
    """Prepare a new process: ignore interrupts, and warnings, of which Pillow prints many about odd metadata."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Make processes that are started inside ignore interrupts from the start: children inherit ignored signals.

    For the milliseconds it takes this process ignores them too. (A blocked signal is not lost, but multiprocessing
    unblocks it.) Only a main thread can do that; called from another, workers ignore them only once their imports are
    done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
