"""File lock (flock) that lets one process at a time work in a directory, and ends with its holder.

    with file_lock(out / "locks" / "rec-0") as lock:
        if lock is None:
            ...                                        # another process holds it
        else:
            subprocess.run(command, pass_fds=[lock])   # stays locked while the command runs

The kernel releases an flock when the last process that has the file open ends, so locks are never stale: a killed
process leaves only its id in the file. A command that inherited the open file keeps the lock until it ends too. Across
hosts this needs a file system that shares flocks, as NFS does.
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

POLL_SECONDS = 0.2


@contextmanager
def file_lock(path: Path, wait: float = 0.0) -> Iterator[int | None]:
    """Lock `path`; yield its file descriptor, or None where another process still holds it after `wait` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + wait
    try:
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                yield None
                return
            time.sleep(min(POLL_SECONDS, wait))
        with suppress(OSError):  # a full disk: locked, but without the holder's id in the file
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> str:
    """Describe who holds the lock: 'process 4711 of host gpu3 since 2026-11-03 12:30:05'."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} of host {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the file is new and still empty
        return "another process"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_process() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
