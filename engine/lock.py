"""One process at a time for a directory: a lock that dies with its holder.

    with held(out / "locks" / "rec-0") as lock:
        if lock is None:
            ...                                        # another process is at it
        else:
            subprocess.run(command, pass_fds=[lock])   # holds on for as long as the command runs

The kernel gives an flock back when the last process that has the file open is gone. So there is no stale lock to be
recognised: of a process that was killed nothing stays but its name in the file; and a command that it had started, and
told to keep the file open, keeps others away until it ends too. Across hosts it needs a file system that shares flocks,
as NFS does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOK_EVERY = 0.2  # seconds


@contextmanager
def held(path: Path, wait: float = 0.0) -> Iterator[int | None]:
    """The open file of the lock, or None where another process still holds it after `wait` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, give_up = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + wait
    try:
        while not _locked(descriptor):
            if time.monotonic() >= give_up:
                yield None
                return
            time.sleep(min(LOOK_EVERY, wait))
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def holder(path: Path) -> str:
    """'process 4711 of host gpu3 since 2026-11-03 12:30:05', from the file of a lock that was not free."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} of host {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # between its making and its first line
        return "another process"


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _myself() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
