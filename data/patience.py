"""Storage that fails is asked again, after 1, 2, 4 ... seconds; what it refuses to the end costs samples, not the run.

    patient = Patience(tries=6)
    patient(lambda: file.read(512, 0))       # its result, or after 31 s of failures its last OSError
    patient.end()                            # whoever waits gives up: the run is stopping

The waits have no random part: ranks that share a storage read different shards, and a test can count on them. A read
that never comes back is not seen here but by the watch over the ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


class Unreadable(Exception):
    """Storage does not give a sample now; the text is the reason that is counted.

    `is_waited_for`: storage failed again and again, and would be waited for as long at the next sample.
    `is_whole_shard`: nothing of the shard can be read.
    """

    def __init__(self, reason: str, is_waited_for: bool = False, is_whole_shard: bool = False) -> None:
        super().__init__(reason)
        self.is_waited_for, self.is_whole_shard = is_waited_for, is_whole_shard


class RetryLater(OSError):
    """A server is busy. `seconds` is the wait that it requests, 0 without one."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Patience:
    """Calls what may raise OSError up to `tries` times. One instance may serve several threads."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self._is_over = threading.Event()

    def __call__(self, action: Callable[[], T], at_once: tuple[type[OSError], ...] = ()) -> T:
        """action(). Errors that are `at_once` are not waited for."""
        tried = 0
        while True:
            try:
                return action()
            except OSError as error:  # noqa: PERF203 - trying again is what the loop is for
                tried += 1
                requested = error.seconds if isinstance(error, RetryLater) else 0.0
                seconds = max(wait_seconds(tried), min(requested, _LONGEST_WAIT_SECONDS))
                if isinstance(error, at_once) or tried == self.tries or self._is_over.wait(seconds):
                    raise

    def end(self) -> None:
        """No more waiting, now or later."""
        self._is_over.set()


def wait_seconds(tried: int) -> float:
    """How long to wait after `tried` failures in a row: 1 -> 1.0, 2 -> 2.0, 3 -> 4.0, at most a minute."""
    return min(_FIRST_WAIT_SECONDS * 2.0 ** (tried - 1), _LONGEST_WAIT_SECONDS)
