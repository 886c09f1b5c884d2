"""The things last used, by number: made when asked for, dropped when others are asked for more recently or by request.

files = Recent(lambda shard_idx: open(names[shard_idx], "rb"), most=128)
files(3) is files(3)                   # True
files.drop(3)                          # the next files(3) opens anew
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """make(number), the last `most` of them kept. Thread-safe; two threads that miss at once both make."""

    def __init__(self, make: Callable[[int], T], most: int) -> None:
        self._make, self._most = make, most
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, number: int) -> T:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        made = self._make(number)
        with self._lock:
            made = self._kept.setdefault(number, made)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made

    def drop(self, number: int) -> None:
        """Forgets one, if it is there."""
        with self._lock:
            self._kept.pop(number, None)
