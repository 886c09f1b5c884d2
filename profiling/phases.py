"""Where a step's time goes: one timeline, cut wherever a phase begins or ends.

    phases = Phases(clock_of(device))
    phases.next_step()
    with phases("trunk"):
        with phases("all_gather"): ...     # counts for all_gather, not for trunk
    phases.read()                          # Reading(steps=1, ms={"trunk": 80.1, "all_gather": 4.2, "other": 0.3})

A cut ends the time of the phase on top of the stack and starts that of the next; so a phase has its own time only, what
is in no phase is "other", and all of them together are the time between two reads. Nothing is left over or counted
twice.

On the CPU a cut is the clock of this process. On CUDA it is an event on the stream that computes, from a pool, and the
host asks for its time only when the device is past it: no step waits. A phase is then what that stream spends between
two cuts, computing or waiting, so a collective on a stream of its own counts with what it holds the computation up, not
with what it takes: its exposed time. What overlaps is free and not seen here; a profiler window (profiling/window.py)
shows it.

`system.phases: false` switches all this off; a profiler window still shows the phases as named ranges.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.profiler import record_function

# In the order of a step. A run has those its config asks for.
PHASES = (
    *("data", "inputs", "teacher", "trunk", "text", "heads", "decoder", "generator", "objectives", "backward"),
    *("all_gather", "reduce_scatter", "all_reduce", "optimizer", "ema", "report", "other"),
)


class Clock(Protocol):
    """Marks in time, and the milliseconds between two of them."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def is_past(self, mark: Any) -> bool:
        """Whether `ms` can be had without waiting."""
        ...

    def wait(self, mark: Any) -> None:
        """Returns when the moment is past."""
        ...

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds from one mark to a later one; both are past."""
        ...

    def release(self, mark: Any) -> None:
        """The mark is not needed any more."""
        ...


class HostClock:
    """Marks are seconds of this process's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def ms(self, begin: float, end: float) -> float:
        return 1000 * (end - begin)

    def release(self, mark: float) -> None:
        pass


class CudaClock:
    """Marks are events on the stream that is current when the clock is made, whatever stream marks them."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        """An event on the stream, from the pool. Nothing is waited for."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has come to the event. Nothing is waited for."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Holds the host until the device has come to the event."""
        mark.synchronize()

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)

    def release(self, mark: torch.cuda.Event) -> None:
        """Puts the event back into the pool: a later `mark` records it anew."""
        self._free.append(mark)


def clock_of(device: torch.device) -> Clock:
    """The clock of a step that runs on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Reading:
    """Own milliseconds of every phase that was entered, and of "other", over `steps` steps."""

    steps: int
    ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        """What the steps took together."""
        return sum(self.ms.values())


class Phases:
    """The recorder. Without a clock it records nothing; while `is_traced`, phases are ranges of torch's profiler."""

    def __init__(self, clock: Clock | None) -> None:
        self.is_traced = False
        self._clock = clock
        self._stack: list[tuple[str, Any]] = []  # (phase, its range in the trace)
        self._regions: dict[str, _Region] = {}
        self._cuts: deque[tuple[str, Any]] = deque()  # (the phase that ended there, the mark)
        self._ms: dict[str, float] = {}
        self._steps = 0
        self._last = clock.mark() if clock is not None else None

    def __call__(self, name: str) -> _Region:
        """A region of the phase `name`, for `with`; regions nest, and a phase may be within itself."""
        if name not in self._regions:
            self._regions[name] = _Region(self, name)
        return self._regions[name]

    def wrap(self, name: str, owner: Any, method: str) -> None:
        """From now on every call of `owner.method` is a region of the phase."""
        call: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return call(*arguments, **options)

        setattr(owner, method, timed)

    @property
    def current(self) -> str:
        """Where the host is now; other threads may ask."""
        return next((name for name, _ in self._stack[-1:]), "other")

    def begin(self, name: str) -> None:
        """Enters the phase; `end` leaves it."""
        if self._clock is not None:
            self._cut()
        trace = record_function(name) if self.is_traced else None
        if trace is not None:
            trace.__enter__()
        self._stack.append((name, trace))

    def end(self) -> None:
        """Leaves the phase that was entered last."""
        if self._clock is not None:
            self._cut()
        _, trace = self._stack.pop()
        if trace is not None:
            trace.__exit__(None, None, None)

    def next_step(self) -> None:
        """Counts a step, and takes in what the device is past; so the events in flight are those of a few steps."""
        self._steps += 1
        self._take_in()

    def read(self) -> Reading:
        """Since the last read; waits for the device. For reports."""
        if self._clock is not None:
            self._cut()
            self._clock.wait(self._cuts[-1][1])
            self._take_in()
        reading = Reading(self._steps, self._ms)
        self._ms, self._steps = {}, 0
        return reading

    def _cut(self) -> None:
        assert self._clock is not None
        self._cuts.append((self._stack[-1][0] if self._stack else "other", self._clock.mark()))

    def _take_in(self) -> None:
        clock = self._clock
        if clock is None:
            return
        while self._cuts and clock.is_past(self._cuts[0][1]):
            name, mark = self._cuts.popleft()
            self._ms[name] = self._ms.get(name, 0.0) + clock.ms(self._last, mark)
            clock.release(self._last)
            self._last = mark


class _Region:
    """One phase of one recorder, entered any number of times."""

    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.begin(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phases.end()
