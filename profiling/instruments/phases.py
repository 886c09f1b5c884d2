"""Measure where a step's time goes: one timeline, cut wherever a phase begins or ends.

    phases = PhaseTimer(clock_of(device))
    phases.next_step()
    with phases("trunk"):
        with phases("all_gather"): ...     # counts for all_gather, not for trunk
    phases.read()                          # PhaseTimes(steps=1, ms={"trunk": 80.1, "all_gather": 4.2, "other": 0.3})

A cut ends the time of the innermost phase and starts that of the next. So a phase has its own time only, time in no
phase is "other", and all phases add up to the time between two reads.

On the CPU a cut is the clock of this process. On CUDA it is an event on the computing stream, from a pool, and the host
reads its time only when the device is past it: no step waits. A phase is then what that stream spends between two cuts,
computing or waiting. A collective on a stream of its own counts with the time that it holds the computation up, its
exposed time; what overlaps shows only in a profiler window (profiling/instruments/profiler.py).

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

# In the order of a step. A run has those that its config needs.
PHASES = (
    *("data", "inputs", "teacher", "trunk", "text", "heads", "decoder", "generator", "objectives", "backward"),
    *("all_gather", "reduce_scatter", "all_reduce", "optimizer", "ema", "report", "other"),
)


class PhaseClock(Protocol):
    """Time marks, and the milliseconds between two of them."""

    def mark(self) -> Any:
        """Mark this moment."""
        ...

    def is_past(self, mark: Any) -> bool:
        """Whether `ms` can be had without waiting."""
        ...

    def wait(self, mark: Any) -> None:
        """Block until the mark is past."""
        ...

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds from one mark to a later one; both are past."""
        ...

    def release(self, mark: Any) -> None:
        """Give the mark back."""
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
        """Record an event from the pool on the stream, without waiting."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has reached the event."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Block the host until the device has reached the event."""
        mark.synchronize()

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)

    def release(self, mark: torch.cuda.Event) -> None:
        """Return the event to the pool, for a later `mark`."""
        self._free.append(mark)


def clock_of(device: torch.device) -> PhaseClock:
    """The clock of a step that runs on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class PhaseTimes:
    """Own milliseconds of every phase that was entered, and of "other", over `steps` steps."""

    steps: int
    ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        """Of all steps."""
        return sum(self.ms.values())


class PhaseTimer:
    """Record phases. Without a clock it records nothing; while `is_traced`, phases are ranges of torch's profiler."""

    def __init__(self, clock: PhaseClock | None) -> None:
        self.is_traced = False
        self._clock = clock
        self._stack: list[tuple[str, Any]] = []  # (phase, its range in the trace)
        self._contexts: dict[str, _PhaseContext] = {}
        self._cuts: deque[tuple[str, Any]] = deque()  # (the phase that ended there, the mark)
        self._ms: dict[str, float] = {}
        self._steps = 0
        self._last = clock.mark() if clock is not None else None

    def __call__(self, name: str) -> _PhaseContext:
        """Return a context of the phase `name`; contexts nest, a phase in itself too."""
        if name not in self._contexts:
            self._contexts[name] = _PhaseContext(self, name)
        return self._contexts[name]

    def wrap(self, name: str, owner: Any, method: str) -> None:
        """Time every later call of `owner.method` as the phase."""
        call: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return call(*arguments, **options)

        setattr(owner, method, timed)

    @property
    def current(self) -> str:
        """The phase that the host is in now; other threads may read it."""
        return next((name for name, _ in self._stack[-1:]), "other")

    def begin(self, name: str) -> None:
        """Enter the phase; `end` leaves it."""
        if self._clock is not None:
            self._cut()
        trace = record_function(name) if self.is_traced else None
        if trace is not None:
            trace.__enter__()
        self._stack.append((name, trace))

    def end(self) -> None:
        """Leave the phase that was entered last."""
        if self._clock is not None:
            self._cut()
        _, trace = self._stack.pop()
        if trace is not None:
            trace.__exit__(None, None, None)

    def next_step(self) -> None:
        """Count a step, and collect the events that are past; so those in flight are of a few steps."""
        self._steps += 1
        self._collect()

    def read(self) -> PhaseTimes:
        """Return the times since the last read; waits for the device. For reports."""
        if self._clock is not None:
            self._cut()
            self._clock.wait(self._cuts[-1][1])
            self._collect()
        reading = PhaseTimes(self._steps, self._ms)
        self._ms, self._steps = {}, 0
        return reading

    def _cut(self) -> None:
        assert self._clock is not None
        self._cuts.append((self._stack[-1][0] if self._stack else "other", self._clock.mark()))

    def _collect(self) -> None:
        clock = self._clock
        if clock is None:
            return
        while self._cuts and clock.is_past(self._cuts[0][1]):
            name, mark = self._cuts.popleft()
            self._ms[name] = self._ms.get(name, 0.0) + clock.ms(self._last, mark)
            clock.release(self._last)
            self._last = mark


class _PhaseContext:
    """Context of one phase, entered any number of times."""

    def __init__(self, phases: PhaseTimer, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.begin(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phases.end()
