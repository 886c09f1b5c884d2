"""What the system allows: disk, shared memory, open files, the clock that times steps."""

from __future__ import annotations

import itertools
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from profiling.checks.finding import Finding

LEAST_DISK, LEAST_SHARED = 5 * 2**30, 2**30  # bytes
LEAST_FILES = 1024
COARSEST_TICK = 1e-5  # seconds; a kernel takes tens of microseconds


def limits(folder: Path, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """`folder` is where runs are written."""
    free = shutil.disk_usage(folder).free
    yield _judged("disk", free >= LEAST_DISK, f"{free / 2**30:.1f} GiB free in {folder}",
                  "make room, or set system.run_dir: a checkpoint takes 16 bytes a parameter")  # fmt: skip
    yield _shared(shared)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = "no limit on open files" if files == resource.RLIM_INFINITY else f"{files} files may be open at once"
    yield _judged("open files", files == resource.RLIM_INFINITY or files >= LEAST_FILES, said, "ulimit -n 65536")
    tick = smallest_tick()
    yield _judged("clock", tick <= COARSEST_TICK, f"time.perf_counter tells {1e9 * tick:.0f} ns apart",
                  "steps are timed coarsely: look at /sys/devices/system/clocksource, tsc is the best")  # fmt: skip


def smallest_tick(looks: int = 1000) -> float:
    """The smallest difference, in seconds, between two looks at the clock that is no zero."""
    moments = [time.perf_counter() for _ in range(looks)]
    steps = [after - before for before, after in itertools.pairwise(moments) if after > before]
    return min(steps, default=float("inf"))


def _shared(folder: Path) -> Finding:
    remedy = "start the container with --shm-size=16g or --ipc=host: ranks of one machine exchange tensors through it"
    if not folder.is_dir():
        return Finding("shared memory", "absent", f"there is no {folder}", remedy)
    usage = shutil.disk_usage(folder)
    said = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {folder}"
    return _judged("shared memory", usage.free >= LEAST_SHARED, said, remedy)


def _judged(name: str, is_ok: bool, said: str, remedy: str) -> Finding:
    return Finding(name, "ok", said) if is_ok else Finding(name, "broken", said, remedy)
