"""Carries out one step: a process of its own, a log of its own, and a record of how it ended.

    record = carry_out(step, Path("gpu_check"), limit_seconds=60)
    record["state"]        # "done", "failed", "late" (ended for taking too long), "left out" (time or a module lacks)

A process of its own, because an illegal access ends all that the process does with the GPU; ended with everything it
started, because a rank that hangs would keep the memory that the next step needs.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from profiling.gpu_check import outcomes
from profiling.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12  # of a log, kept with a step that did not end well
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
Record = dict[str, Any]


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that are not installed; none is imported."""
    return [module for module in modules if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent package, or one half taken out
        return False


def carry_out(step: Step, out: Path, limit_seconds: float, is_dry: bool = False, caches: Path | None = None) -> Record:
    """The step's record; what it prints goes to out/{step}.log. `caches`: where compilers keep what they made."""
    record = begun(step)
    if lacking := missing(step.needs):
        return record | {"state": "left out", "why": f"not installed: {', '.join(lacking)}"}
    log = out / f"{step.name}.log"
    command = [sys.executable, *step.words(str(out), is_dry)]
    begin = time.monotonic()
    exit_code = _run(command, log, limit_seconds, caches)
    record |= {"command": command[1:], "seconds": time.monotonic() - begin, "exit_code": exit_code}
    record |= {"limit_seconds": limit_seconds, **outcomes.read(out / f"{step.name}.tests")}
    if exit_code in step.good:
        return record | {"state": "done"}
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    state, why = "failed", f"exit code {exit_code}"
    if exit_code is None:
        state, why = "late", f"took longer than {limit_seconds:.0f} s"
    if record.get("running"):
        why += f" in {record['running']}"
    return record | {"state": state, "why": why, "last_lines": lines}


def begun(step: Step) -> Record:
    """Return the record of a step that is running: what is left if the check is killed meanwhile."""
    return {"step": step.name, "question": step.question, "without": missing(step.extra), "state": "running"}


def outcome(record: Record) -> str:
    """What came of a step, in words."""
    seconds = f"after {record['seconds']:.0f} s" if "seconds" in record else ""
    counts = ", ".join(f"{count} {what}" for what, count in record.get("tests", {}).items())
    without = f"without {', '.join(record['without'])}" if record.get("without") else ""
    return "; ".join(filter(None, (f"{record['state']} {seconds}".strip(), record.get("why"), counts, without)))


def forget(step: Step, out: Path) -> None:
    """Removes what an earlier check in the same folder left of a step: nobody should take it for this one's."""
    for file in out.glob(f"{step.name}.*"):
        file.unlink()


def unpack(archive: Path) -> Path:
    """Unpack `archive`, if it exists, into the folder of the compilers' caches; return that folder."""
    folder = Path(tempfile.gettempdir()) / "vtp_engine_compiler_caches"
    folder.mkdir(exist_ok=True)
    archive.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is an error now, not at the end
    if archive.is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def pack(caches: Path, archive: Path) -> int:
    """Writes the folder's content into a .tar.gz; returns its bytes."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(caches, ".")
    return archive.stat().st_size


def _run(command: list[str], log: Path, limit_seconds: float, caches: Path | None) -> int | None:
    """The exit code; None where the limit came first."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ) | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if caches is not None:
        environment |= {name: str(caches / folder) for name, folder in CACHES.items()}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
