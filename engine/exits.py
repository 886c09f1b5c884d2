"""How a run ends: exit codes of engine/launch.py, and runs/NAME/failures.jsonl.

| code | meaning | restart |
|---|---|---|
| 0 | done | no |
| 2 | a mistake of the user; one line says which | no |
| 70 | the training cannot go on: non-finite losses, ranks differ, a last checkpoint cannot be written | no |
| 75 | a rank was lost: dead, silent, stuck, or it failed by itself | yes |
| 143 | stopped by a signal (engine/health/anomalies.py) or RUN/stop, after a checkpoint | yes, when there is room |
| others | an error of a library or of ours, or a signal | yes |

"restart" is whether one from the last checkpoint has a chance. A rank that ends alone with 2 or 70 ends the others with
it too (engine/watchdog/). 70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of BSD's sysexits.h.

    record_failure(run_dir, Failure(rank=3, step=120, phase="backward", kind="silent", message="not heard of for 60 s"))
    last_failure(run_dir)               # the newest, or None

Imports no torch: the supervisor reads both.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable_files import AppendOnlyFile

DONE = 0
MISTAKE = 2
FAILED = 70
LOST_RANK = 75
STOPPED = 143  # 128 + SIGTERM, as the shell would report it
FINAL = (DONE, MISTAKE, FAILED, STOPPED)  # the supervisor returns these as they are

FAILURES_FILE = "failures.jsonl"


@dataclass(frozen=True)
class FailureRecord:
    """One line of failures.jsonl: `rank` failed after `step` finished steps, in `phase`."""

    rank: int
    step: int
    phase: str
    kind: str  # dead, silent, stuck or failed, of a lost rank; or the name of an exception
    message: str
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)


def record_failure(run_dir: Path, failure: FailureRecord) -> None:
    """Append one line. Where the run directory cannot be written nothing is raised: the failure itself matters more."""
    AppendOnlyFile(run_dir / FAILURES_FILE).append(json.dumps(asdict(failure)))


def last_failure(run_dir: Path) -> FailureRecord | None:
    """Return the newest failure; None where there is none, or the file cannot be read."""
    try:
        lines = (run_dir / FAILURES_FILE).read_text().splitlines()
        return FailureRecord(**json.loads(lines[-1])) if lines else None
    except (OSError, ValueError, TypeError):
        return None
