"""The variables a launcher sets; ranks end with their launcher; when the supervisor starts it again, and how it stops.

Ranks whose launcher, or the process above it, ends, end too; those of a shell do not. Restarts: back-off, progress,
failures that come back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from configs import UserError
from engine import launcher
from engine.exits import FAILED, STOPPED
from engine.launcher import LaunchResult, RestartPolicy
from tests.engine.small_runs import wait_until

pytestmark = pytest.mark.L0
ROOT = Path(launcher.__file__).parents[1]


def test_a_rank_reads_its_numbers_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.rank_environment() == {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}


# "NAME runner" starts "NAME launch", which starts "NAME rank": as deepspeed, its launch.py and a rank.
CHAIN = """
import os, signal, subprocess, sys, time
kind, here = sys.argv[1:]
with open(f"{here}/{kind}", "w") as file:
    file.write(f"{os.getpid()}\\n")
if kind != "rank":
    following = {"runner": "launch", "launch": "rank"}[kind]
    sys.exit(subprocess.call([sys.executable, sys.argv[0], following, here]))
from engine import launcher
def end(*_):
    open(f"{here}/terminated", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
launcher.POLL_SECONDS = 0.05
launcher.end_with_launcher()
open(f"{here}/ready", "w").close()
while not os.path.exists(f"{here}/end"):
    time.sleep(0.02)
"""


@contextmanager
def chain(here: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    (here / name).write_text(CHAIN)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, here / name, "runner", here], env={**os.environ, **variables})
    try:
        wait_until((here / "ready").exists, "the rank", str)
        yield process
    finally:
        (here / "end").touch()
        for kind in ("runner", "launch", "rank"):
            with suppress(ProcessLookupError):
                os.kill(pid_of(here, kind), signal.SIGKILL)
        process.wait()


def pid_of(here: Path, kind: str) -> int:
    return int((here / kind).read_text())


@pytest.mark.parametrize("killed", ["runner", "launch"])
def test_a_rank_gets_sigterm_when_a_launcher_above_it_is_killed(tmp_path: Path, killed: str) -> None:
    with chain(tmp_path, "deepspeed"):
        assert not (tmp_path / "terminated").exists()
        os.kill(pid_of(tmp_path, killed), signal.SIGKILL)
        wait_until((tmp_path / "terminated").exists, "SIGTERM", str)


def test_only_launchers_are_watched(tmp_path: Path) -> None:
    with chain(tmp_path, "train.sh"):
        assert launcher.launcher_pids(pid_of(tmp_path, "rank")) == []
    assert launcher.launcher_pids(0) == []


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/usr/bin/python", "/usr/bin/torchrun", "--nproc-per-node", "2"], True),
        (["python", "engine/launch.py", "--launcher", "deepspeed"], False),
        (["bash", "-c", "deepspeed engine/launch.py; echo done"], False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(
    words: list[str], is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: "\0".join(words).encode() + b"\0")
    assert launcher._is_launcher(1) is is_one


LOST = LaunchResult(code=75, checkpoint=0, failure="")


def waits(patience: RestartPolicy, ends: list[LaunchResult]) -> list[float | None]:
    return [patience.next_wait(end) for end in ends]


def test_waits_double_up_to_a_limit_and_end_after_so_many_restarts() -> None:
    patience = RestartPolicy(max_restarts=8)
    assert waits(patience, [LOST] * 9) == [5, 10, 20, 40, 80, 160, 300, 300, None]
    assert patience.reason == "8 restarts have brought no new checkpoint"
    assert waits(RestartPolicy(max_restarts=0), [LOST]) == [None]


def test_a_new_checkpoint_is_progress() -> None:
    patience = RestartPolicy(max_restarts=2)
    ends = [LaunchResult(75, checkpoint, "") for checkpoint in (0, 0, 100, 100, 200, 200, 200)]
    assert waits(patience, ends) == [5, 10, 5, 10, 5, 10, None]


def test_the_same_failure_twice_without_progress_is_given_up_another_is_not() -> None:
    patience = RestartPolicy(max_restarts=9)
    assert waits(patience, [LaunchResult(1, 100, "120 ValueError x"), LaunchResult(1, 100, "130 ValueError x")]) == [
        5,
        10,
    ]
    assert patience.next_wait(LaunchResult(1, 100, "130 ValueError x")) is None
    assert patience.reason == "it fails the same way each time"
    patience = RestartPolicy(max_restarts=9)
    assert waits(patience, [LaunchResult(1, 100, "130 ValueError x"), LaunchResult(1, 200, "130 ValueError x")]) == [
        5,
        5,
    ]


# What a launcher does: notes its arguments, and ends as the next line of the plan says.
LAUNCHER = """
import json, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
plan = json.loads((here / "plan").read_text())
act = plan[len((here / "calls").read_text().splitlines()) - 1]
if act.get("failure"):
    with (here / "run" / "failures.jsonl").open("a") as file:
        file.write(json.dumps(act["failure"]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(act["signalled"]))
stop = here / "run" / "stop"
if act.get("lays"):
    stop.touch()
if act.get("removes"):
    while not stop.exists():
        time.sleep(0.01)
        (here / "ready").touch()
    stop.unlink()
if act.get("waits"):
    (here / "ready").touch()
    while act.get("deaf") or not stop.exists():
        time.sleep(0.01)
sys.exit(act["code"])
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return tmp_path


def start(
    here: Path, plan: Sequence[Mapping[str, object]], max_restarts: int, stop_seconds: float = 60.0
) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, with short waits."""
    (here / "plan").write_text(json.dumps(plan))
    program = (
        "import signal, sys, pathlib; from engine import launcher; launcher.BACK_OFF = (0.1, 0.2);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # under nohup it is ignored
        f"launcher.STOP_SECONDS = {stop_seconds};"
        "here = pathlib.Path(sys.argv[1]);"
        "sys.exit(launcher.supervise(f'{sys.executable} {here}/launcher.py {here}', pathlib.Path('launch.py'),"
        f"['--max-restarts', '3', '--config', 'a.yaml', '--resume', 'auto', 'name=x'], here / 'run', {max_restarts}))"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(here)], stderr=subprocess.PIPE, text=True)


def calls(here: Path) -> list[list[str]]:
    return [json.loads(line) for line in (here / "calls").read_text().splitlines()]


def failure(step: int) -> dict[str, object]:
    return {"rank": 1, "step": step, "phase": "trunk", "kind": "dead", "message": "m", "host": "h", "time": time.time()}


def test_a_lost_rank_is_a_restart_and_a_mistake_is_none(here: Path) -> None:
    plan = [{"code": 75, "failure": failure(step)} for step in (3, 4)] + [{"code": 2}]
    process = start(here, plan, max_restarts=3)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert calls(here) == [["launch.py", "--config", "a.yaml", "name=x", "--resume=auto"]] * 3
    assert said.count("supervisor: exit code 75 after the checkpoint of step 0; again in ") == 2


def test_a_deterministic_failure_is_given_up_and_says_where_to_look(here: Path) -> None:
    process = start(here, [{"code": 1, "failure": failure(3) | {"time": i}} for i in range(5)], max_restarts=4)
    _, said = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert len(calls(here)) == 2
    assert "given up: it fails the same way each time" in said
    assert "failures.jsonl" in said


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


RUNS: dict[str, dict[str, object]] = {
    "that looks": {"code": 143, "waits": True, "signalled": 1},
    "that took the first wish for an old one": {"code": 143, "waits": True, "removes": True, "signalled": 1},
    "that fails instead": {"code": 75, "waits": True, "signalled": 1},
    "that is deaf": {"code": 0, "waits": True, "deaf": True, "signalled": 143},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_stop_is_a_file_for_the_ranks_before_it_is_a_signal_and_nothing_is_started_again(
    here: Path, run: str
) -> None:
    process = start(here, [RUNS[run], {"code": 0}], 3, stop_seconds=1.0 if "deaf" in run else 60.0)
    wait_for(here / "ready", process)
    wish = {"that looks": signal.SIGHUP, "that fails instead": signal.SIGUSR1}
    process.send_signal(wish.get(run, signal.SIGTERM))
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert len(calls(here)) == 1
    assert not (here / "run" / "stop").exists()


def test_a_second_signal_is_passed_on_at_once(here: Path) -> None:
    process = start(here, [RUNS["that is deaf"]], 3)
    wait_for(here / "ready", process)
    process.send_signal(signal.SIGTERM)
    wait_for(here / "run" / "stop", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == STOPPED


def test_a_file_left_from_before_stops_nothing_one_laid_meanwhile_ends_the_restarts(here: Path) -> None:
    (here / "run" / "stop").touch()
    lays = {"code": 75, "lays": True}
    process = start(here, [{"code": 75}, lays, {"code": 0}], max_restarts=3)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert len(calls(here)) == 2


def test_a_launcher_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    for command in ("", "no-such-launcher --flag"):
        with pytest.raises(UserError, match="there is no such command"):
            launcher.supervise(command, tmp_path / "launch.py", [], tmp_path, 1)
    with pytest.raises(UserError, match="--max-restarts -1: give 0 or more"):
        launcher.supervise("true", tmp_path / "launch.py", [], tmp_path, -1)
