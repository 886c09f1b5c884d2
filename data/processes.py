"""A function over many items by several processes: results in order, and no more of them in memory than are worked on.

    for picture in map_in_order(load, names, workers=8):     # the same as map(load, names)
        ...

Processes are spawned: the caller may hold threads (torch, tokenizers), which a forked child must not inherit half
alive. An interrupt is the caller's: the processes end when it lets go of the results.
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
CORES = len(os.sched_getaffinity(0))  # that this process may use


def map_in_order(function: Callable[[T], R], items: Sequence[T], workers: int, chunk: int = 8) -> Iterator[R]:
    """function(item) of each item, in order, `chunk` items at a time. Raises OSError where a process dies."""
    if workers == 1:
        yield from map(function, items)
        return
    starts = iter(range(0, len(items), chunk))
    waiting: deque[Future[list[R]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)

    def submit(most: int) -> None:
        while len(waiting) < most and (start := next(starts, None)) is not None:
            waiting.append(pool.submit(_apply, function, items[start : start + chunk]))

    try:
        with _interrupts_left_to_this_process():
            submit(workers)  # which starts them all
        while waiting:
            submit(2 * workers)
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            "a process died at its work: it was killed, ran out of memory, or crashed on a file; see the system's log, "
            "and run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _apply(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _prepare() -> None:
    """In a new process. Pillow warns of odd metadata on several lines each; what does not decode is an error anyway."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


@contextmanager
def _interrupts_left_to_this_process() -> Iterator[None]:
    """Processes started inside ignore interrupts from their first moment on: children inherit what is ignored.

    For the milliseconds it takes this process ignores them too. (A blocked signal is not lost, but multiprocessing
    unblocks it.) Only a main thread can do that; called from another, workers are deaf once their imports are done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
