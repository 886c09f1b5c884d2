"""Times are taken in turns; ratios are paired within rounds."""

from __future__ import annotations

import pytest

from profiling import clock
from profiling.clock import Comparison, Times, alternate

pytestmark = pytest.mark.L0


def test_variants_take_turns_and_warm_up_first() -> None:
    order: list[str] = []
    times = alternate({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warmups=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times[name].seconds) for name in times} == {"a": 3, "b": 3, "c": 3}


def test_calls_are_numbered_and_the_last_warm_up_call_is_round_0() -> None:
    seen: list[tuple[str, int]] = []
    alternate({"a": int, "b": int}, rounds=1, warmups=2, on_timing=lambda name, number, _: seen.append((name, number)))
    assert seen == [("a", -1), ("a", 0), ("b", -1), ("b", 0), ("a", 1), ("b", 1)]


def test_what_a_variant_takes_is_what_the_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    times = alternate({"slow": lambda: work(3.0), "fast": lambda: work(1.5)}, rounds=5)
    assert times["slow"].seconds == (3.0,) * 5
    assert times["fast"].median == 1.5
    assert times.ratio("slow", "fast") == 2.0
    assert times["slow"].spread == 0.0


def test_a_ratio_is_the_median_of_quotients_of_one_round() -> None:
    times = Comparison(a=Times((2.0, 40.0, 2.0)), b=Times((1.0, 20.0, 0.5)))
    assert times.ratio("a", "b") == 2.0
    assert times["a"].median / times["b"].median == 2.0
    assert times["b"].spread == 0.0, "three rounds have no quartiles"
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(0.5)
