"""What ended a run before its end, for people and for the supervisor: runs/NAME/failures.jsonl, a line a failure.

record(run_dir, Failure(rank=3, step=120, phase="backward", kind="silent", message="not heard of for 60 s"))
last(run_dir)               # the newest, or None
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable_files import AppendOnlyFile

FILE = "failures.jsonl"


@dataclass(frozen=True)
class Failure:
    """`rank` is the one that failed, as the one that tells knows it; `step` is how many it had finished."""

    rank: int
    step: int
    phase: str
    kind: str  # of the lost rank: dead, silent, stuck, failed; or the name of an exception
    message: str
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)


def record(run_dir: Path, failure: Failure) -> None:
    """Appends one line. A run directory that cannot be written is no reason to hide the failure itself."""
    AppendOnlyFile(run_dir / FILE).append(json.dumps(asdict(failure)))


def last(run_dir: Path) -> Failure | None:
    """The newest failure; None where there is none, or the file is no such list."""
    try:
        lines = (run_dir / FILE).read_text().splitlines()
        return Failure(**json.loads(lines[-1])) if lines else None
    except (OSError, ValueError, TypeError):
        return None
