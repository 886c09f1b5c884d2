"""Run a study's stages: skip finished ones, resume interrupted ones, record outcomes, share cells between processes.

    run_cells(layout, cells, WorkSession(deadline=None, threads=1), say=print)       # CellStates(done=..., failed=...)

    cells/joint-2/stages/tokenizer.json      {"fingerprint": "5e1f...", "is_done": true, "seconds": 1284.0, ...}
    cells/joint-2/logs/tokenizer.log         output of the command, over all its runs

A stage is done if its record says so, has today's fingerprint, and the result exists. A record of the same fingerprint
that is not done means that the stage was interrupted: a training resumes from its checkpoint, anything else starts
again, as does every stage whose fingerprint has changed.

Cells are worked on cheapest budget first. The first process makes what all cells need while the others wait; a cell
that another process has locked is passed over; after a failure, which is recorded with its log, the other cells go on.
Processes that were already running leave a failed cell alone; the next command tries it again.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs import UserError
from data.durable_files import write_atomic
from engine.run_directory import file_lock, lock_holder
from evaluation.study.cells import PORT, ROOT, Cell, Stage, StudyLayout

StageOutcome = Literal["skipped", "done", "failed", "stopped"]
POLL_SECONDS = 0.5
GRACE_SECONDS = 180.0  # for a training to save a checkpoint after a stop signal


@dataclass(frozen=True)
class WorkSession:
    """Deadline (time.monotonic) of this process, and the environment of the commands it runs."""

    deadline: float | None = None
    threads: int = 1  # of each command

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def environment(self) -> dict[str, str]:
        """Return this process's variables, with the number of threads, and this tree first on PYTHONPATH."""
        python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return dict(os.environ) | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": python_path}


def record_path(folder: Path, stage: Stage) -> Path:
    """Return the path of a stage's record in the folder of its cell."""
    return folder / "stages" / f"{stage.name}.json"


def read_record(folder: Path, stage: Stage) -> dict[str, Any]:
    """Read the record of a stage; empty if there is none, or one of another fingerprint."""
    try:
        found: dict[str, Any] = json.loads(record_path(folder, stage).read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("fingerprint") == stage.fingerprint else {}


def mark_done(folder: Path, stage: Stage) -> None:
    """Record as done a stage whose result was copied from elsewhere."""
    _write_record(record_path(folder, stage), {"fingerprint": stage.fingerprint, "is_done": True, "seconds": 0.0})


def is_done(folder: Path, stage: Stage) -> bool:
    """Return whether the stage's record, of today's fingerprint, says that it is done, and its result exists."""
    return bool(read_record(folder, stage).get("is_done")) and stage.result.exists()


def run_stage(stage: Stage, folder: Path, lock: int, session: WorkSession) -> StageOutcome:
    """Run or resume one stage of the cell in `folder` until it or the session ends; `lock` is the cell's open lock."""
    if is_done(folder, stage):
        return "skipped"
    record = read_record(folder, stage)
    resumes = bool(record) and stage.is_training and stage.checkpoint.exists()
    if not resumes:
        shutil.rmtree(stage.folder, ignore_errors=True)
        record = {"fingerprint": stage.fingerprint, "is_done": False, "seconds": 0.0}
    stage.folder.mkdir(parents=True, exist_ok=True)
    command = [word.replace(PORT, str(_free_port())) for word in stage.command] + ["--resume"] * resumes
    _write_record(record_path(folder, stage), record | {"command": command})
    started = time.monotonic()
    exit_code = _run(command, folder / "logs" / f"{stage.name}.log", lock, session)
    is_good = exit_code == 0 and stage.result.exists()
    seconds = record["seconds"] + time.monotonic() - started
    _write_record(record_path(folder, stage), record | {"command": command, "is_done": is_good, "seconds": seconds,
                                                 "exit_code": exit_code})  # fmt: skip
    return "done" if is_good else "stopped" if exit_code is None else "failed"


def _run(command: list[str], log: Path, lock: int, session: WorkSession) -> int | None:
    """Run a command and return its exit code; None if the session ended, or a signal came, first."""
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
    """Stop a command and its children: SIGTERM, a wait for checkpoints to be saved, then SIGKILL."""
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, stop_signal)
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            if process.poll() is not None and not _is_group_running(process.pid):
                return
            time.sleep(POLL_SECONDS)


def _is_group_running(group: int) -> bool:
    """Return whether a process of the group is alive; zombies do not count."""
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


def _write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record atomically, since it may be read meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2) + "\n")


FAILED = "failed.json"
TAIL_LINES = 3  # of a log, shown with a failure
ERROR = re.compile(r"error: |[\w.]*(Error|Exception)\b: ")  # the engine's errors, and the last line of a traceback


@dataclass
class CellStates:
    """Names of cells by their state after a pass of this process."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)  # by the time limit, or not reached before it
    busy: list[str] = field(default_factory=list)  # in other processes


def run_cells(
    layout: StudyLayout,
    cells: Sequence[Cell],
    session: WorkSession,
    say: Callable[[str], None],
    after_cell: Callable[[], object] = lambda: None,
    after_corpus: Callable[[], object] = lambda: None,
) -> CellStates:
    """Run all cells once; call `after_corpus` when the corpus exists and `after_cell` after each cell.

    Raises UserError if a shared stage fails.
    """
    began, tally = time.time(), CellStates()
    if not _run_shared_stages(layout, session, say, after_corpus):
        tally.stopped += [cell.name for cell in cells]
        return tally
    for cell in cells:
        if all(is_done(layout.cell(cell), stage) for stage in layout.stages(cell)):
            tally.done.append(cell.name)
            continue
        if session.is_over:
            tally.stopped.append(cell.name)
            continue
        with file_lock(layout.lock(cell.name)) as lock:
            if lock is None:
                say(f"{cell.name}: {lock_holder(layout.lock(cell.name))} is at it")
                tally.busy.append(cell.name)
                continue
            getattr(tally, _run_cell(layout, cell, lock, session, began, say)).append(cell.name)
        after_cell()
    return tally


def read_failure(folder: Path) -> dict[str, object] | None:
    """Read the record of a cell's failure: stage, log and its error lines; None without one."""
    path = folder / FAILED
    return json.loads(path.read_text()) if path.exists() else None


def _run_shared_stages(
    layout: StudyLayout, session: WorkSession, say: Callable[[str], None], after_corpus: Callable[[], object]
) -> bool:
    """Run the shared stages under their lock; return whether corpus and feature network now exist."""
    stages = layout.shared()
    with file_lock(layout.lock("shared"), wait=math.inf) as lock:
        assert lock is not None
        for stage in stages:
            if not is_done(layout.out, stage):
                say(f"shared: {stage.name}")
            outcome = run_stage(stage, layout.out, lock, session)
            if outcome == "failed":
                log = layout.out / "logs" / f"{stage.name}.log"
                raise UserError(f"{stage.name} failed, and every cell needs it: {error_lines(log)}; see {log}")
            if outcome == "stopped":
                return False
            if stage.name == "corpus":
                after_corpus()
    return True


def _run_cell(
    layout: StudyLayout, cell: Cell, lock: int, session: WorkSession, began: float, say: Callable[[str], None]
) -> str:
    """Run a cell's stages until one fails or the session ends; return the name of its list in CellStates."""
    folder = layout.cell(cell)
    record = folder / FAILED
    if record.exists() and record.stat().st_mtime > began:
        return "failed"
    record.unlink(missing_ok=True)
    for stage in layout.stages(cell):
        if session.is_over:
            return "stopped"
        started = time.monotonic()
        outcome = run_stage(stage, folder, lock, session)
        if outcome != "skipped":
            say(f"{cell.name}: {stage.name} {outcome} after {time.monotonic() - started:.0f} s")
        if outcome == "failed":
            _record_failure(folder, stage, say)
        if outcome in ("failed", "stopped"):
            return outcome
    return "done"


def _record_failure(folder: Path, stage: Stage, say: Callable[[str], None]) -> None:
    log = folder / "logs" / f"{stage.name}.log"
    words = error_lines(log)
    failed = {"stage": stage.name, "log": str(log), "last_words": words}
    write_atomic(folder / FAILED, json.dumps(failed, indent=2) + "\n")
    say(f"{folder.name}: {words} ({log})")


def error_lines(log: Path) -> str:
    """Return the last line of a log that names an error, or the last few lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return errors[-1] if errors else " | ".join(lines[-TAIL_LINES:])
