"""The directory of a run: where it is, the lock that keeps other runs out, the file that asks the run to stop.

    run_directory(config)                               # runs/NAME
    touch runs/NAME/stop                                # by hand, by a job's script, by the supervisor (launcher.py)
    with file_lock(out / "locks" / "rec-0") as lock:
        if lock is None:
            ...                                         # another process holds it
        else:
            subprocess.run(command, pass_fds=[lock])    # stays locked while the command runs

Any number of hosts see the stop file, whoever started the ranks. The first rank looks for it at every report; all save
and end with 143. A start removes the file: it is meant for the run that is under way, never for one to come.

The kernel releases an flock when the last process that has the file open ends, so locks are never stale: a killed
process leaves only its id in the file. A command that inherited the open file keeps the lock until it ends too. Across
hosts this needs a file system that shares flocks, as NFS does. Imports no torch: a start asks before that is loaded.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from configs import RunConfig, UserError
from engine.stderr import print_error

STOP_FILE, LOCK_FILE = "stop", "lock"  # in the run's directory
POLL_SECONDS = 0.2
NFS_LEASE_SECONDS = 90.0  # how long an NFS server keeps the lock of a host that is gone


def run_directory(config: RunConfig) -> Path:
    """Return system.run_dir, or runs/NAME below the working directory."""
    return Path(config.system.run_dir or f"runs/{config.name}")


def checkpoint_directory(config: RunConfig) -> Path:
    """Return the directory of the run's checkpoints."""
    return run_directory(config) / "checkpoints"


def request_stop(run_dir: Path) -> bool:
    """Create the stop file; return whether it is there: not where the directory cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)  # a run that has just been started has none yet
        (run_dir / STOP_FILE).touch()
    except OSError:
        return False
    return True


def is_stop_requested(run_dir: Path) -> bool:
    """Whether the stop file is there."""
    return (run_dir / STOP_FILE).is_file()


def clear_stop_request(run_dir: Path) -> None:
    """Remove the stop file, if it is there."""
    if is_stop_requested(run_dir):
        (run_dir / STOP_FILE).unlink(missing_ok=True)


def lock_run_directory(stack: ExitStack, run_dir: Path, wait: float) -> None:
    """Lock `run_dir` until `stack` closes. Raises UserError where another run still holds it after `wait` seconds."""
    path = run_dir / LOCK_FILE
    try:
        if stack.enter_context(file_lock(path)) is not None:
            return
        wait += 0.0 if f"host {socket.gethostname()} " in lock_holder(path) else NFS_LEASE_SECONDS
        print_error(f"{run_dir} is in use by {lock_holder(path)}: waiting {wait:g} s for it to end")
        if stack.enter_context(file_lock(path, wait)) is not None:
            return
    except OSError as error:
        print_error(
            f"warning: {path} cannot be locked ({error.strerror or error}): a second run in this directory would not "
            "be noticed; start none"
        )
        return
    raise UserError(
        f"{run_dir} is in use by {lock_holder(path)}: two runs would write over each other's checkpoints; let that one "
        f"end (`touch {run_dir}/stop` makes it save and stop), choose another name=..., or remove {path} if its host "
        "is gone for good"
    )


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
