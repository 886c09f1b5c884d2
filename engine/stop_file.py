"""Asking a run to stop through its directory: any number of hosts see it, whoever started the ranks.

    touch runs/NAME/stop                # by hand, by a job's script, by the supervisor (engine/supervise.py)

The first rank looks for it at every report; all save and end with 143. A start removes what it finds: the file is meant
for the run that is under way, never for one to come.
"""

from __future__ import annotations

from pathlib import Path

FILE = "stop"


def ask(run_dir: Path) -> bool:
    """Whether the wish is there now; not where the directory cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)  # a run that has just been started has none yet
        (run_dir / FILE).touch()
    except OSError:
        return False
    return True


def is_asked(run_dir: Path) -> bool:
    """Whether the run is asked to stop."""
    return (run_dir / FILE).is_file()


def forget(run_dir: Path) -> None:
    """Whatever was asked before is void."""
    if is_asked(run_dir):
        (run_dir / FILE).unlink(missing_ok=True)
