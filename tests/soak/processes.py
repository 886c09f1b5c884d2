"""The processes of one run, found by a mark in their environment, whoever started them.

mark = {"VTP_SOAK": "4711"}                    # given to the first of them, inherited by all others
ranks("4711")                                  # {0: 1234, 1: 1235}
use_of(1234)                                   # Use(role="rank 0", rss_mib=612.0, num_files=41, num_threads=19)
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "VTP_SOAK"
PROC = Path("/proc")
END_SECONDS = 30.0


@dataclass(frozen=True)
class Use:
    """What one process holds at one moment."""

    role: str  # supervisor, launcher, rank N; other
    rss_mib: float
    num_files: (
        int  # open, but for the first handle on each shard: a rank opens shards as it comes to them, and keeps them
    )
    num_threads: int


def marked(mark: str) -> list[int]:
    """Ids of the living processes with this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in _all():
        with suppress(OSError):
            if wanted in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def role_of(pid: int) -> str:
    """What a process does in the run. Raises OSError when it is gone."""
    words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    for word in words:
        if found := re.fullmatch(r"--local_rank=(\d+)", word):
            return f"rank {found[1]}"
    if any("deepspeed" in word for word in words[:4]):
        return "launcher"
    return "supervisor" if "--max-restarts" in words else "other"


def ranks(mark: str) -> dict[int, int]:
    """Process ids by rank, of ranks that have come as far as having a second thread."""
    found = {}
    for pid in marked(mark):
        with suppress(OSError):
            role = role_of(pid)
            if role.startswith("rank ") and len(list((PROC / str(pid) / "task").iterdir())) > 1:
                found[int(role[5:])] = pid
    return found


def use_of(pid: int) -> Use:
    """Raises OSError when the process is gone."""
    here = PROC / str(pid)
    pages = int((here / "statm").read_text().split()[1])
    targets = [_target(file) for file in (here / "fd").iterdir()]
    shards = {target for target in targets if target.endswith(".tar")}
    threads = len(list((here / "task").iterdir()))
    return Use(role_of(pid), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(targets) - len(shards), threads)


def end_all(mark: str) -> None:
    """SIGKILL to all of them; returns when they are gone."""
    until = time.monotonic() + END_SECONDS
    while there := marked(mark):
        if time.monotonic() > until:
            raise TimeoutError(f"processes {there} do not end")
        for pid in there:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _target(file: Path) -> str:
    """What an entry of /proc/PID/fd leads to; "" for one that has been closed meanwhile."""
    try:
        return os.readlink(file)
    except FileNotFoundError:
        return ""


def _all() -> Iterator[int]:
    return (int(path.name) for path in PROC.glob("[0-9]*"))
