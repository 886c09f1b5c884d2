"""Carries out one stage: skips what is done, goes on with what was cut off, records what happened.

    cells/joint-2/stages/tokenizer.json      {"fingerprint": "5e1f...", "is_done": true, "seconds": 1284.0, ...}
    cells/joint-2/logs/tokenizer.log         what the command printed, run after run

A stage is done when its record says so, its fingerprint is today's and its result is there. A record of the same
fingerprint that is not done means that it was cut off: a training goes on from its checkpoint, anything else starts
afresh, as does everything whose fingerprint has changed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.durable_files import write_atomic
from evaluation.study.stages import PORT, ROOT, Stage

Outcome = Literal["skipped", "done", "failed", "stopped"]
POLL_SECONDS = 0.5
GRACE_SECONDS = 180.0  # for a training to save a checkpoint after it was asked to stop


@dataclass(frozen=True)
class Session:
    """This process's share of a study: when it has to stop (time.monotonic), and what commands find around them."""

    deadline: float | None = None
    threads: int = 1  # of a command

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def environment(self) -> dict[str, str]:
        """This process's variables, with the number of threads and with this tree first on PYTHONPATH."""
        python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return dict(os.environ) | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": python_path}


def record_path(folder: Path, stage: Stage) -> Path:
    """Of one stage, in the folder of its cell."""
    return folder / "stages" / f"{stage.name}.json"


def read_record(folder: Path, stage: Stage) -> dict[str, Any]:
    """What is recorded of a stage under today's fingerprint; empty where there is nothing, or of another."""
    try:
        found: dict[str, Any] = json.loads(record_path(folder, stage).read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("fingerprint") == stage.fingerprint else {}


def mark_done(folder: Path, stage: Stage) -> None:
    """Records a stage whose result came from elsewhere."""
    _write(record_path(folder, stage), {"fingerprint": stage.fingerprint, "is_done": True, "seconds": 0.0})


def is_done(folder: Path, stage: Stage) -> bool:
    """Whether its record under today's fingerprint says so and its result is there."""
    return bool(read_record(folder, stage).get("is_done")) and stage.result.exists()


def carry_out(stage: Stage, folder: Path, lock: int, session: Session) -> Outcome:
    """Brings one stage of the cell in `folder` to its end, or to the session's; `lock` is the cell's, held open."""
    if is_done(folder, stage):
        return "skipped"
    record = read_record(folder, stage)
    resumes = bool(record) and stage.is_training and stage.checkpoint.exists()
    if not resumes:
        shutil.rmtree(stage.folder, ignore_errors=True)
        record = {"fingerprint": stage.fingerprint, "is_done": False, "seconds": 0.0}
    stage.folder.mkdir(parents=True, exist_ok=True)
    command = [word.replace(PORT, str(_free_port())) for word in stage.command] + ["--resume"] * resumes
    _write(record_path(folder, stage), record | {"command": command})
    started = time.monotonic()
    exit_code = _run(command, folder / "logs" / f"{stage.name}.log", lock, session)
    is_good = exit_code == 0 and stage.result.exists()
    seconds = record["seconds"] + time.monotonic() - started
    _write(record_path(folder, stage), record | {"command": command, "is_done": is_good, "seconds": seconds,
                                                 "exit_code": exit_code})  # fmt: skip
    return "done" if is_good else "stopped" if exit_code is None else "failed"


def _run(command: list[str], log: Path, lock: int, session: Session) -> int | None:
    """The command's exit code; None where the session's end, or a signal to this process, came first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=session.environment(),
            pass_fds=[lock], start_new_session=True,
        )  # fmt: skip
        try:
            while (exit_code := process.poll()) is None and not session.is_over:
                time.sleep(POLL_SECONDS)
        finally:
            if process.returncode is None:
                _stop(process)
    return exit_code


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the command and all it started to end, waits for checkpoints to be saved, then insists."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            if process.poll() is not None and not _is_anyone_left(process.pid):
                return
            time.sleep(POLL_SECONDS)


def _is_anyone_left(group: int) -> bool:
    """Whether a process of the group is still at work; one that has ended and that nobody has asked about is not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, since it may be read while it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2) + "\n")
