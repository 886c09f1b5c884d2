"""A timeline is cut into phases; nothing is left over and nothing counts twice."""

from __future__ import annotations

import pytest
import torch

from profiling.instruments.phases import CudaClock, HostClock, PhaseTimer, clock_of
from tests.cuda_waits import sync_debug_mode

pytestmark = pytest.mark.L0


class Device:
    """A clock that a test sets, and a device that is behind by `lag` marks."""

    def __init__(self) -> None:
        self.now, self.past = 0.0, 1 << 30
        self.made, self.released, self.waited = 0, 0, 0

    def mark(self) -> tuple[int, float]:
        self.made += 1
        return self.made, self.now

    def is_past(self, mark: tuple[int, float]) -> bool:
        return mark[0] <= self.past

    def wait(self, mark: tuple[int, float]) -> None:
        self.waited, self.past = self.waited + 1, max(self.past, mark[0])

    def ms(self, begin: tuple[int, float], end: tuple[int, float]) -> float:
        assert max(begin[0], end[0]) <= self.past, "read before the device was there"
        return end[1] - begin[1]

    def release(self, mark: tuple[int, float]) -> None:
        self.released += 1


def step(phases: PhaseTimer, device: Device) -> None:
    """trunk 10 + 5 with a gather of 3 between, 2 in no phase, backward 20 of which 4 in a gather within a gather."""
    phases.next_step()
    with phases("trunk"):
        device.now += 10
        with phases("all_gather"):
            device.now += 3
        device.now += 5
    device.now += 2
    with phases("backward"):
        device.now += 16
        with phases("all_gather"), phases("all_gather"):
            device.now += 4


def test_a_phase_has_its_own_time_and_all_together_the_whole() -> None:
    device = Device()
    phases = PhaseTimer(device)
    step(phases, device)
    step(phases, device)
    reading = phases.read()
    assert reading.steps == 2
    assert reading.ms == {"trunk": 30, "all_gather": 14, "backward": 32, "other": 4}
    assert reading.total_ms == device.now == 80
    device.now += 7
    assert phases.read().ms == {"other": 7}


def test_a_phase_that_fails_is_left() -> None:
    device = Device()
    phases = PhaseTimer(device)

    def fail() -> None:
        with phases("trunk"):
            device.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    device.now += 2
    assert phases.read().ms == {"trunk": 1, "other": 2}


def test_wrapped_calls_are_regions_and_give_what_they_gave() -> None:
    device = Device()
    phases = PhaseTimer(device)

    class Engine:
        def step(self, ms: float, *, twice: bool) -> float:
            device.now += ms
            return 2 * ms if twice else ms

    engine = Engine()
    phases.wrap("optimizer", engine, "step")
    assert engine.step(3.0, twice=True) == 6.0
    assert phases.read().ms == {"other": 0, "optimizer": 3}
    assert "step" not in vars(Engine())


def test_steps_take_in_what_the_device_is_past_and_only_a_read_waits() -> None:
    device = Device()
    phases = PhaseTimer(device)
    device.past = 4  # the mark of the start and three of the first step's eight cuts
    step(phases, device)
    phases.next_step()
    assert (device.waited, device.released) == (0, 3)
    assert phases.read().ms["trunk"] == 15
    assert (device.waited, device.released) == (1, device.made - 1)  # the last mark begins what comes next


def test_without_a_clock_nothing_is_recorded() -> None:
    phases = PhaseTimer(None)
    with phases("trunk"):
        phases.next_step()
    assert phases.read().ms == {}


def test_while_traced_phases_are_ranges_of_the_profiler_whether_timed_or_not() -> None:
    for phases in (PhaseTimer(None), PhaseTimer(HostClock())):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as record:
            with phases("before"):
                torch.ones(1)
            phases.is_traced = True
            with phases("trunk"), phases("all_gather"):
                torch.ones(1)
        names = {event.key for event in record.key_averages()}
        assert {"trunk", "all_gather"} <= names
        assert "before" not in names


def test_the_host_is_timed_in_milliseconds() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    assert clock.ms(1.0, 1.25) == 250.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_the_device_and_are_used_again() -> None:
    clock = clock_of(torch.device("cuda"))
    assert isinstance(clock, CudaClock)
    phases = PhaseTimer(clock)
    x = torch.randn(2048, 2048, device="cuda")
    for _ in range(2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        phases.read()
        begin.record()
        with sync_debug_mode("error"):
            for _ in range(20):
                phases.next_step()
                with phases("trunk"):
                    for _ in range(10):
                        x @ x
                with torch.cuda.stream(torch.cuda.Stream()), phases("all_gather"):
                    pass  # on a stream beside: the one that computes does not wait for it
        end.record()
        reading = phases.read()
        assert reading.total_ms == pytest.approx(begin.elapsed_time(end), rel=0.05)
        assert reading.ms["trunk"] > 0.9 * reading.total_ms
    num_events = len(clock._free)
    with phases("trunk"):
        x @ x
    phases.read()
    assert len(clock._free) == num_events
