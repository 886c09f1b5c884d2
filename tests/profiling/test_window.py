"""A window of steps under torch's profiler: where it was asked for, and nowhere else."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from profiling.instruments.phases import PhaseTimer
from profiling.instruments.profiler import ProfilerWindow
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
CLOCK_TICK_US = 0.002  # times are written in thousandths


def steps(window: ProfilerWindow, phases: PhaseTimer, first: int, end: int) -> None:
    """Every step takes a product whose width names the step: 100 + step."""
    with window:
        for step in range(first, end):
            window.before(step)
            with phases("trunk"):
                torch.ones(2, 100 + step) @ torch.ones(100 + step, 2)
            window.after(step)


def recorded(path: Path) -> tuple[set[int], set[str]]:
    """The steps whose products are in the trace, and the phases named in it."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::mm"]
    return (
        {event["args"]["Input Dims"][0][1] - 100 for event in products},
        {event["name"] for event in events if event.get("cat") == "user_annotation"},
    )


@pytest.mark.parametrize(
    ("first", "end", "name", "inside"),
    [
        (0, 6, "steps2-4", {2, 3}),  # a whole run
        (3, 6, "steps3-4", {3}),  # resumed inside the window
        (0, 3, "steps2-3", {2}),  # stopped inside it
    ],
)
def test_the_window_is_written_with_its_steps_and_phases(
    tmp_path: Path, first: int, end: int, name: str, inside: set[int]
) -> None:
    phases = PhaseTimer(None)
    window = ProfilerWindow(tiny_config("profile.steps=2:4", "profile.ranks=[1]"), phases, tmp_path, rank=1)
    steps(window, phases, first, end)
    found, names = recorded(tmp_path / "profile" / f"rank1-{name}.json.gz")
    assert found == inside
    assert {f"ProfilerStep#{step}" for step in inside} | {"trunk"} <= names
    assert not {f"ProfilerStep#{step}" for step in set(range(6)) - inside} & names
    [board] = (tmp_path / "tensorboard" / "profile").iterdir()
    assert board.name == f"rank1-{name}.pt.trace.json.gz"
    assert recorded(board) == (found, names)
    assert "aten::mm" in (tmp_path / "profile" / f"rank1-{name}.txt").read_text()
    assert not phases.is_traced


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_the_profiler_prints_no_error_about_its_absence(tmp_path: Path) -> None:
    """In a process of its own: the profiler reads its log level once."""
    code = (
        "import sys; from pathlib import Path; from profiling.instruments.phases import PhaseTimer;"
        "from profiling.instruments.profiler import ProfilerWindow; from tests.tiny import tiny_config;"
        "from tests.profiling.test_window import steps; phases = PhaseTimer(None);"
        "steps(ProfilerWindow(tiny_config('profile.steps=0:1'), phases, Path(sys.argv[1]), rank=0), phases, 0, 1)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "profile").iterdir())
    assert "gpuGetDeviceCount" not in done.stderr
    assert "profiler_start" not in done.stderr


def test_a_window_that_the_profiler_cannot_write_is_one_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no trace")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    phases, lines = PhaseTimer(None), list[str]()
    steps(ProfilerWindow(tiny_config("profile.steps=2:3"), phases, tmp_path, rank=0, log=lines.append), phases, 0, 4)
    assert lines == [f"could not write {tmp_path}/profile/rank0-steps2-3: RuntimeError: no trace"]
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_window_is_what_viewers_of_chromes_format_read(tmp_path: Path) -> None:
    """The rules Perfetto's documentation gives for JSON: ranges of a thread nest, flows have both ends, times are
    numbers; and what TensorBoard's plugin looks for: steps by name, in order, that hold the operators."""
    phases = PhaseTimer(None)
    with ProfilerWindow(tiny_config("profile.steps=1:4"), phases, tmp_path, rank=0) as window:
        for step in range(5):
            window.before(step)
            with phases("trunk"):
                product = torch.ones(4, 4, requires_grad=True) @ torch.ones(4, 4)
            with phases("backward"):
                product.sum().backward()
            window.after(step)
    events = json.loads(gzip.decompress((tmp_path / "profile" / "rank0-steps1-4.json.gz").read_bytes()))["traceEvents"]
    assert {event["ph"] for event in events} <= set("XMisf")
    ranges = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and {"ts", "pid", "tid", "name"} <= event.keys() for event in ranges)
    assert_ranges_nest(ranges)

    flows = Counter((event["id"], event["ph"]) for event in events if event["ph"] in "sf")
    assert flows
    assert all(flows[number, "s"] == flows[number, "f"] == 1 for number, _ in flows)

    taken = sorted((event for event in ranges if "ProfilerStep" in event["name"]), key=lambda event: event["ts"])
    assert [event["name"] for event in taken] == ["ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"]
    products = [event["ts"] for event in ranges if event["name"] == "aten::mm"]
    for step in taken:
        inside = [ts for ts in products if step["ts"] <= ts <= step["ts"] + step["dur"]]
        assert len(inside) == len(products) / 3 > 0


def assert_ranges_nest(ranges: list[dict[str, Any]]) -> None:
    threads = defaultdict(list)
    for event in ranges:
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        open_until: list[float] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + CLOCK_TICK_US, event
            open_until.append(end)


@pytest.mark.parametrize(
    ("overrides", "first"),
    [((), 0), (("profile.steps=2:4", "profile.ranks=[1]"), 0), (("profile.steps=2:4",), 4)],
    ids=["not asked for", "another rank", "resumed behind it"],
)
def test_else_nothing_is_written(tmp_path: Path, overrides: tuple[str, ...], first: int) -> None:
    phases = PhaseTimer(None)
    steps(ProfilerWindow(tiny_config(*overrides), phases, tmp_path, rank=0), phases, first, 6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["10", "13:10", "3:3", "-1:3", "a:b", "1:2:3", "[1,2]", "1.5:3"])
def test_what_is_no_window_is_refused_in_one_sentence(steps: str) -> None:
    with pytest.raises(UserError, match=r"profile.steps.*is no window of steps: .*write 10:13") as error:
        tiny_config(f"profile.steps={steps}")
    assert "\n" not in str(error.value)


def test_a_window_beyond_the_run_is_refused() -> None:
    assert tiny_config("profile.steps=4:6").profile.span == (4, 6)
    with pytest.raises(UserError, match=r"profile.steps=4:7 but optim.steps=6"):
        tiny_config("profile.steps=4:7")


def test_ranks_without_a_window_are_refused() -> None:
    with pytest.raises(UserError, match=r"ranks=\[0, 3\] but steps is not set: .*give profile.steps=FIRST:END"):
        tiny_config("profile.ranks=[0,3]")
    assert tiny_config("profile.ranks=[0]").profile.steps is None  # as config.yaml of a run without a window has it
