"""Keeps a run going: starts the launcher, and again from the last good checkpoint when a rank is lost.

    python engine/launch.py --max-restarts 3 --launcher "deepspeed --hostfile hosts" --config configs/vtp_l.yaml ...

Between two starts it waits, twice as long each time (BACK_OFF). A new checkpoint is progress: the count and the wait
begin anew. A failure that comes back at the same step with the same words and no progress in between is deterministic,
and another start would be wasted. SIGTERM and SIGUSR1 go to the launcher's processes of this machine; on several hosts
signal a rank instead (docs/clusters/ssh.md). A supervisor that was asked to stop starts nothing again. Imports no
torch: it outlives what it starts by weeks.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import UserError
from engine import failures
from engine.checkpoint.directory import candidates, step_of
from engine.complaint import complain
from engine.exits import FAILED, FINAL, STOPPED

BACK_OFF = (5.0, 300.0)  # seconds before the first restart, and at most
END_SECONDS = 60.0  # what is left of a launcher's processes gets to end


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
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> int:
        """The exit code of the whole."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._pass_on)
        while True:
            end = self._start()
            if end.code in FINAL:
                return end.code
            if self._is_stopping:
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
        self._process = subprocess.Popen(self._command, start_new_session=True)
        code = self._process.wait()
        self._clear_away(self._process.pid)
        there = candidates(self._run_dir / "checkpoints")
        failure = failures.last(self._run_dir)
        words = "" if failure is None or failure == before else f"{failure.step} {failure.kind} {failure.message}"
        return End(code if code >= 0 else 128 - code, step_of(there[0]) if there else 0, words)

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
        while time.monotonic() < end and not self._is_stopping:
            time.sleep(0.1)
        return self._is_stopping

    def _pass_on(self, number: int, _: object) -> None:
        self._is_stopping = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


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
