"""The variables a launcher sets; ranks end when it, or the process above it, ends, those of a shell do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine import launcher
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
