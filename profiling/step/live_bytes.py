"""Every storage that torch makes and frees while code runs, in the order of events: memory as a curve over time.

    live = LiveBytes()
    with live.on("forward"):
        y = (x @ w).relu()            # two storages come; without a graph the first goes again
    live.events                       # [Event("forward", 4096), Event("forward", 4096), Event("forward", -4096)]
    peak(live.events)                 # 8192

Works on real tensors and, under FakeTensorMode, on tensors without memory, with the same result: bytes of storages that
operators return. What a kernel takes and gives back within itself is not seen, nor is an allocator's rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event(NamedTuple):
    """A storage came or went, a gradient was complete, or a place in the program was passed."""

    label: str  # who made the storage
    delta: int = 0  # bytes
    gradient: int = 0  # elements of the parameter whose gradient is complete
    mark: tuple[str, str, int] | None = None


class LiveBytes(TorchDispatchMode):
    """Notes what happens inside `on`, in `events`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.label = ""
        self._alive: dict[int, Any] = {}

    def known(self, tensors: Iterable[Tensor]) -> None:
        """These were there before and are no part of the curve, whoever returns them."""
        for tensor in tensors:
            self._alive[tensor.untyped_storage()._cdata] = tensor

    @contextmanager
    def on(self, label: str) -> Iterator[None]:
        """Inside, what torch makes is noted, under `label`."""
        before, self.label = self.label, label
        with self:
            yield
        self.label = before

    def mark(self, kind: str, place: str, number: int) -> None:
        """Notes that the program is here."""
        self.events.append(Event(self.label, mark=(kind, place, number)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in (found,) if isinstance(found, Tensor) else tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, label = storage._cdata, storage.nbytes(), self.label
        if key in self._alive or not size:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.events.append(Event(label, -size))

        self._alive[key] = weakref.ref(storage, gone)
        self.events.append(Event(label, size))


def peak(events: Iterable[Event]) -> int:
    """The most bytes alive at one moment, beyond those alive before the first event."""
    live = most = 0
    for event in events:
        live += event.delta
        most = max(most, live)
    return most
