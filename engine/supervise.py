"""Keeps a run going: starts the launcher, and again from the last good checkpoint when a rank is lost.

    python engine/launch.py --max-restarts 3 --launcher "deepspeed --hostfile hosts" --config configs/vtp_l.yaml ...

Between two starts it waits, twice as long each time (BACK_OFF). A new checkpoint is progress: the count and the wait
begin anew. A failure that comes back at the same step with the same words and no progress in between is deterministic,
and another start would be wasted.

SIGTERM, SIGUSR1, SIGINT and a terminal that closes (SIGHUP) ask the run to stop through its directory
(engine/stop_file.py), which reaches the ranks of every host; a supervisor that was asked starts nothing again. The
signal itself is passed to the launcher's processes, which are those of this machine, when that has not helped in
STOP_SECONDS, or when a second signal comes: DeepSpeed's launchers give ranks half a minute from there. Imports no
torch: it outlives what it starts by weeks.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs import UserError
from engine import failures, stop_file
from engine.checkpoint.directory import candidates, step_of
from engine.complaint import complain
from engine.exits import FAILED, FINAL, STOPPED

BACK_OFF = (5.0, 300.0)  # seconds before the first restart, and at most
END_SECONDS = 60.0  # what is left of a launcher's processes gets to end
STOP_SECONDS = 600.0  # what ranks get for the rest of a report's steps and the save
LOOK_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class End:
    """How a start ended."""

    code: int
    checkpoint: int  # step of the last one, 0 without
    failure: str  # step, kind and words; nothing where nobody told


class Patience:
    """When to start again. `next_wait` gives seconds, or None with `why` to give up."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts, self._restarts = max_restarts, 0
        self._last: End | None = None
        self.why = ""

    def next_wait(self, end: End) -> float | None:
        """After a start that ended so; None: give up."""
        previous, self._last = self._last, end
        if previous is not None and end.checkpoint > previous.checkpoint:
            self._restarts, previous = 0, None
        if previous is not None and end.failure and end.failure == previous.failure:
            self.why = "it fails the same way each time"
            return None
        if self._restarts >= self._max_restarts:
            self.why = f"{self._restarts} restarts have brought no new checkpoint"
            return None
        self._restarts += 1
        first, most = BACK_OFF
        return min(most, first * 2 ** (self._restarts - 1))


class Supervisor:
    """Runs `command` until it is done, given up or told to stop."""

    def __init__(self, command: Sequence[str], run_dir: Path, max_restarts: int, say: Callable[[str], None]) -> None:
        self._command, self._run_dir, self._say = list(command), run_dir, say
        self._patience = Patience(max_restarts)
        self._is_stopping, self._signal, self._due = False, 0, math.inf  # which is passed on, and when

    def run(self) -> int:
        """The exit code of the whole."""
        hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # ignored under nohup
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hang_up):
            signal.signal(number, self._ask)
        stop_file.forget(self._run_dir)
        try:
            return self._run()
        finally:
            with suppress(OSError):
                stop_file.forget(self._run_dir)

    def _run(self) -> int:
        while True:
            end = self._start()
            if end.code in FINAL:
                return end.code
            if self._is_asked():
                return STOPPED
            wait = self._patience.next_wait(end)
            if wait is None:
                self._say(f"given up: {self._patience.why} (exit code {end.code}; {self._run_dir / failures.FILE})")
                return FAILED
            self._say(f"exit code {end.code} after the checkpoint of step {end.checkpoint}; again in {wait:g} s")
            if self._is_stopped_within(wait):
                return STOPPED

    def _start(self) -> End:
        before = failures.last(self._run_dir)
        process = subprocess.Popen(self._command, start_new_session=True)
        code = self._wait(process)
        self._clear_away(process.pid)
        try:
            there = candidates(self._run_dir / "checkpoints")
        except UserError:  # the ranks have printed what is wrong with `latest`
            there = []
        failure = failures.last(self._run_dir)
        words = "" if failure is None or failure == before else f"{failure.step} {failure.kind} {failure.message}"
        return End(code if code >= 0 else 128 - code, step_of(there[0]) if there else 0, words)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The launcher's exit code. A wish to stop is repeated: a run that has just begun takes it for an old one."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY)
            if not self._is_stopping:
                continue
            is_told = stop_file.ask(self._run_dir)
            if time.monotonic() >= self._due or (self._due < math.inf and not is_told):
                self._due = math.inf
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, self._signal)

    def _clear_away(self, group: int) -> None:
        """Ends what is left of the launcher's processes on this machine: GPUs and ports must be free for the next."""
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
        while time.monotonic() < end and not self._is_asked():
            time.sleep(0.1)
        return self._is_asked()

    def _is_asked(self) -> bool:
        return self._is_stopping or stop_file.is_asked(self._run_dir)

    def _ask(self, number: int, _: object) -> None:
        self._signal, self._due = number, time.monotonic() + (0 if self._is_stopping else STOP_SECONDS)
        self._is_stopping = True


def supervise(launcher: str, script: Path, arguments: Sequence[str], run_dir: Path, max_restarts: int) -> int:
    """Starts `launcher script arguments --resume auto`, again and again. Raises UserError for a bad launcher."""
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: give 0 or more")
    words = shlex.split(launcher)
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # deepspeed lies beside the interpreter
    if not words or (found := shutil.which(words[0], path=path)) is None:
        raise UserError(f"--launcher {launcher!r}: there is no such command; give one that starts the ranks")
    command = [found, *words[1:], str(script), *_of_a_rank(arguments)]
    return Supervisor(command, run_dir, max_restarts, _say).run()


def _of_a_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without those of the supervisor; the run starts where there is no checkpoint, else goes on."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in ("--max-restarts", "--launcher"):
            if not equals:
                next(words, None)
        elif name != "--resume":
            kept.append(word)
    return [word for word in kept if word not in ("auto", "latest")] + ["--resume=auto"]


def _say(words: str) -> None:
    complain(f"supervisor: {words}")
