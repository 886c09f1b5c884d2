"""How each fault of the schedule is done to a run.

do(fault, run)              # returns once it is done; what comes of it is the run's business
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from engine.checkpoint.directory import resume_candidates
from tests.soak.processes import end_all, ranks
from tests.soak.schedule import Fault

SAVE_SECONDS = 60.0  # at most, until a checkpoint is being written
NO_ROOM = 4096  # bytes; every file of a run is larger, or soon will be
FULL_SECONDS = (3.0, 12.0)


class Target(Protocol):
    """What a fault has to know of a run."""

    mark: str
    silent_seconds: float

    @property
    def checkpoints(self) -> Path: ...

    def ask_to_stop(self) -> None:
        """SIGTERM to the supervisor."""
        ...


def do(fault: Fault, run: Target) -> str:
    """Does it; gives what was done, in words."""
    return WAYS[fault.kind](fault, run)


def _kill(fault: Fault, run: Target) -> str:
    _signal(fault, run, signal.SIGKILL)
    return f"SIGKILL to rank {fault.rank}"


def _stop(fault: Fault, run: Target) -> str:
    _signal(fault, run, signal.SIGSTOP)
    return f"SIGSTOP to rank {fault.rank}"


def _crash(fault: Fault, run: Target) -> str:
    end_all(run.mark)
    return "SIGKILL to all processes"


def _preempt(fault: Fault, run: Target) -> str:
    run.ask_to_stop()
    return "SIGTERM to the supervisor"


def _kill_in_save(fault: Fault, run: Target) -> str:
    until = time.monotonic() + SAVE_SECONDS
    while not any(run.checkpoints.glob(".step-*.tmp")) and time.monotonic() < until:
        time.sleep(0.001)
    drafts = [path.name for path in run.checkpoints.glob(".step-*.tmp")]
    _signal(fault, run, signal.SIGKILL)
    return f"SIGKILL to rank {fault.rank} while there was {', '.join(drafts) or 'no draft, for it was gone already'}"


def _spoil(fault: Fault, run: Target) -> str:
    until = time.monotonic() + SAVE_SECONDS
    while len(there := resume_candidates(run.checkpoints)) < 2 and time.monotonic() < until:
        time.sleep(0.1)  # what is spoiled must not be all there is
    newest = there[0]
    rng = random.Random(fault.strength)
    file = rng.choice(sorted(newest.iterdir()))
    done = rng.choice((_flip, _cut_off, _remove))(file, rng)
    _signal(fault, run, signal.SIGKILL)
    return f"{newest.name}/{file.name} {done}, SIGKILL to rank {fault.rank}"


def _flip(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"with bit {bit} flipped"


def _cut_off(file: Path, rng: random.Random) -> str:
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"cut off after {size} bytes"


def _remove(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "removed"


def _pause(fault: Fault, run: Target) -> str:
    seconds = run.silent_seconds * (0.1 + 0.4 * fault.strength)
    _signal(fault, run, signal.SIGSTOP)
    time.sleep(seconds)
    _signal(fault, run, signal.SIGCONT)
    return f"rank {fault.rank} stopped for {seconds:.1f} s"


def _full_disk(fault: Fault, run: Target) -> str:
    seconds = FULL_SECONDS[0] + (FULL_SECONDS[1] - FULL_SECONDS[0]) * fault.strength
    there = ranks(run.mark).values()
    for pid in there:
        _limit_files(pid, NO_ROOM)
    time.sleep(seconds)
    for pid in there:
        _limit_files(pid, resource.RLIM_INFINITY)
    return f"no file could grow for {seconds:.1f} s"


def _limit_files(pid: int, num_bytes: int) -> None:
    with suppress(ProcessLookupError):
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, most))


def _signal(fault: Fault, run: Target, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, KeyError):
        os.kill(ranks(run.mark)[fault.rank], number)


WAYS: Mapping[str, Callable[[Fault, Target], str]] = {
    "kill": _kill,
    "stop": _stop,
    "crash": _crash,
    "preempt": _preempt,
    "kill in save": _kill_in_save,
    "spoil": _spoil,
    "pause": _pause,
    "full disk": _full_disk,
}
