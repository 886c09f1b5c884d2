"""The process launcher above the ranks (`deepspeed`, `torchrun`): its variables, ending with it, starting it again.

    rank_environment()      # {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8}; those of a single rank without a launcher
    end_with_launcher()     # at the start of a rank: a thread polls the launcher processes once a second
    supervise("deepspeed --hostfile hosts", script, arguments, run_dir, max_restarts=3)

From below: a killed `deepspeed` would leave its ranks running unnoticed. `deepspeed` starts `python -m
deepspeed.launcher.launch`, which starts the ranks, so every ancestor process that is a launcher is watched. A rank
whose launcher has ended sends itself SIGTERM: before its first step it ends at once, later it saves at the next report
(engine/health/anomalies.py). A rank that a shell or a scheduler started may outlive it. Why not
prctl(PR_SET_PDEATHSIG): it covers the parent process alone, and fires when the *thread* that started us ends.

From above: with `--max-restarts` the supervisor starts the launcher, and again from the last good checkpoint when a
rank is lost. Between two starts it waits, twice as long each time (BACK_OFF). A new checkpoint is progress: count and
wait begin anew. A failure that comes back at the same step with the same message and no progress in between is
deterministic, and another start would be wasted.

SIGTERM, SIGUSR1, SIGINT and a terminal that closes (SIGHUP) make the supervisor ask the run to stop through its
directory (engine/run_directory.py), which reaches the ranks of every host; it then starts nothing again. The signal
itself is passed to the launcher's processes, which are those of this host, when that has not helped in STOP_SECONDS, or
when a second signal comes: DeepSpeed's launchers give ranks half a minute from there.

Imports no torch: a start reads the variables before anything heavy is loaded, and the supervisor outlives what it
starts by weeks.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from configs import UserError
from engine import exits, run_directory
from engine.checkpoint.directory import resume_candidates, step_of
from engine.exits import FAILED, FINAL, STOPPED
from engine.stderr import print_error

SINGLE_RANK = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
LAUNCHER_PROGRAMS = ("deepspeed", "ds", "torchrun")  # by path, or as the script of an interpreter
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed")  # of python -m
POLL_SECONDS = 1.0
BACK_OFF = (5.0, 300.0)  # seconds before the first restart, and at most before a later one
END_SECONDS = 60.0  # that the rest of a launcher's processes get to end
STOP_SECONDS = 600.0  # that ranks get for the steps to the next report and the save
WAIT_SECONDS = 0.5  # between two looks for a stop request


def rank_environment() -> dict[str, int]:
    """Read RANK, LOCAL_RANK and WORLD_SIZE from the environment; unset ones are those of a single rank.

    Raises UserError where one is not a number, or RANK is not below WORLD_SIZE.
    """
    given = {name: os.environ[name] for name in SINGLE_RANK if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(
                f"{name}={value!r} in the environment is not a number: a launcher sets it for every rank; start the "
                f"run with one, or `unset {' '.join(given)}` to run alone"
            )
    values = SINGLE_RANK | {name: int(value) for name, value in given.items()}
    is_beyond = {"RANK", "WORLD_SIZE"} <= given.keys() and values["RANK"] >= values["WORLD_SIZE"]
    if is_beyond or values["WORLD_SIZE"] < 1:
        raise UserError(
            f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']} in the environment: ranks are counted from 0 "
            "to WORLD_SIZE - 1; start the run with a launcher, which sets both, or unset both to run alone"
        )
    return values


def end_with_launcher() -> None:
    """Start a thread that ends this rank when its launcher ends; nothing where no launcher started it."""
    if "RANK" in os.environ and (launchers := launcher_pids(os.getpid())):
        threading.Thread(target=_poll_launchers, args=(launchers,), name="launcher watch", daemon=True).start()


def launcher_pids(pid: int) -> list[int]:
    """List the process ids of the launchers above a process, the nearest first."""
    pids: list[int] = []
    while (pid := _parent(pid)) > 1 and _is_launcher(pid):
        pids.append(pid)
    return pids


def _poll_launchers(launchers: list[int]) -> None:
    """Wait until a process of the chain has another parent, then send SIGTERM to this one."""
    chain = (os.getpid(), *launchers)
    while all(_parent(child) == parent for child, parent in pairwise(chain)):
        time.sleep(POLL_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_error("the launcher of these ranks has ended: they save at the next report and end, as at SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(pid: int) -> int:
    """Return the parent's process id; 0 where the process has ended, or this system has no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_launcher(pid: int) -> bool:
    """Whether the command line of a process is a launcher's."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    is_module = any(flag == "-m" and name.startswith(LAUNCHER_MODULES) for flag, name in pairwise(arguments[:4]))
    return is_module or any(Path(argument).name in LAUNCHER_PROGRAMS for argument in arguments[:2])


@dataclass(frozen=True)
class LaunchResult:
    """How one run of the launcher ended."""

    code: int
    checkpoint: int  # step of the last checkpoint, 0 without
    failure: str  # step, kind and message; "" where none was recorded


class RestartPolicy:
    """Decide whether to start again. `next_wait` returns seconds, or None with `reason` to give up."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts, self._restarts = max_restarts, 0
        self._last: LaunchResult | None = None
        self.reason = ""

    def next_wait(self, end: LaunchResult) -> float | None:
        """Return how long to wait after a start that ended so; None to give up."""
        previous, self._last = self._last, end
        if previous is not None and end.checkpoint > previous.checkpoint:
            self._restarts, previous = 0, None
        if previous is not None and end.failure and end.failure == previous.failure:
            self.reason = "it fails the same way each time"
            return None
        if self._restarts >= self._max_restarts:
            self.reason = f"{self._restarts} restarts have brought no new checkpoint"
            return None
        self._restarts += 1
        first, most = BACK_OFF
        return min(most, first * 2 ** (self._restarts - 1))


class Supervisor:
    """Run `command`, restarting it after failures, until it is done, hopeless or stopped."""

    def __init__(self, command: Sequence[str], run_dir: Path, max_restarts: int, log: Callable[[str], None]) -> None:
        self._command, self._run_dir, self._log = list(command), run_dir, log
        self._policy = RestartPolicy(max_restarts)
        self._is_stopping, self._signal, self._due = False, 0, math.inf  # which is passed on, and when

    def run(self) -> int:
        """Run; return the exit code of the whole."""
        hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # ignored under nohup
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hang_up):
            signal.signal(number, self._on_signal)
        run_directory.clear_stop_request(self._run_dir)
        try:
            return self._run()
        finally:
            with suppress(OSError):
                run_directory.clear_stop_request(self._run_dir)

    def _run(self) -> int:
        while True:
            end = self._start()
            if end.code in FINAL:
                return end.code
            if self._is_stop_requested():
                return STOPPED
            wait = self._policy.next_wait(end)
            if wait is None:
                self._log(
                    f"given up: {self._policy.reason} (exit code {end.code}; {self._run_dir / exits.FAILURES_FILE})"
                )
                return FAILED
            self._log(f"exit code {end.code} after the checkpoint of step {end.checkpoint}; again in {wait:g} s")
            if self._is_stopped_within(wait):
                return STOPPED

    def _start(self) -> LaunchResult:
        before = exits.last_failure(self._run_dir)
        process = subprocess.Popen(self._command, start_new_session=True)
        code = self._wait(process)
        self._end_processes(process.pid)
        try:
            checkpoints = resume_candidates(self._run_dir / "checkpoints")
        except UserError:  # the ranks have printed what is wrong with `latest`
            checkpoints = []
        failure = exits.last_failure(self._run_dir)
        text = "" if failure is None or failure == before else f"{failure.step} {failure.kind} {failure.message}"
        return LaunchResult(code if code >= 0 else 128 - code, step_of(checkpoints[0]) if checkpoints else 0, text)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Return the launcher's exit code. Repeat a stop request: a run that has just begun takes it for an old one."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(WAIT_SECONDS)
            if not self._is_stopping:
                continue
            is_requested = run_directory.request_stop(self._run_dir)
            if time.monotonic() >= self._due or (self._due < math.inf and not is_requested):
                self._due = math.inf
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, self._signal)

    def _end_processes(self, group: int) -> None:
        """End the rest of the launcher's processes on this host: GPUs and ports must be free for the next start."""
        for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
            give_up = time.monotonic() + seconds
            while time.monotonic() < give_up:
                try:
                    os.killpg(group, number)
                except ProcessLookupError:
                    return
                time.sleep(0.2)

    def _is_stopped_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_stop_requested():
            time.sleep(0.1)
        return self._is_stop_requested()

    def _is_stop_requested(self) -> bool:
        return self._is_stopping or run_directory.is_stop_requested(self._run_dir)

    def _on_signal(self, number: int, _: object) -> None:
        self._signal, self._due = number, time.monotonic() + (0 if self._is_stopping else STOP_SECONDS)
        self._is_stopping = True


def supervise(launcher: str, script: Path, arguments: Sequence[str], run_dir: Path, max_restarts: int) -> int:
    """Run `launcher script arguments --resume auto`, again and again. Raises UserError for a bad launcher."""
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: give 0 or more")
    command = shlex.split(launcher)
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # deepspeed lies beside the interpreter
    if not command or (program := shutil.which(command[0], path=path)) is None:
        raise UserError(f"--launcher {launcher!r}: there is no such command; give one that starts the ranks")
    full_command = [program, *command[1:], str(script), *_rank_arguments(arguments)]
    return Supervisor(full_command, run_dir, max_restarts, _log).run()


def _rank_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the supervisor's; the run starts where there is no checkpoint, else resumes."""
    kept, remaining = [], iter(arguments)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if name in ("--max-restarts", "--launcher"):
            if not equals:
                next(remaining, None)
        elif name != "--resume":
            kept.append(word)
    return [word for word in kept if word not in ("auto", "latest")] + ["--resume=auto"]


def _log(message: str) -> None:
    print_error(f"supervisor: {message}")
