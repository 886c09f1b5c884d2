"""Carries out one step: a process of its own, a log of its own, and a record of how it ended.

    record = carry_out(step, Path("gpu_check"), limit_seconds=60)
    record["state"]        # "done", "failed", "late" (ended for taking too long), "left out" (time or a module lacks)

A process of its own, because an illegal access ends all that the process does with the GPU; ended with everything it
started, because a rank that hangs would keep the memory that the next step needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from profiling.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12  # of a log, kept with a step that did not end well
ABSENT = re.compile(r"ModuleNotFoundError: No module named '[\w.]+'")
Record = dict[str, Any]


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that are not installed; none is imported."""
    return [module for module in modules if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent package, or one half taken out
        return False


def carry_out(step: Step, out: Path, limit_seconds: float, is_dry: bool = False) -> Record:
    """The step's record; what it prints goes to out/{step}.log."""
    record: Record = {"step": step.name, "question": step.question, "without": missing(step.extra)}
    if lacking := missing(step.needs):
        return record | {"state": "left out", "why": f"not installed: {', '.join(lacking)}"}
    log = out / f"{step.name}.log"
    command = [sys.executable, *step.words(str(out), is_dry)]
    begin = time.monotonic()
    exit_code = _run(command, log, limit_seconds)
    record |= {"command": command[1:], "seconds": time.monotonic() - begin, "exit_code": exit_code}
    record |= _tests(out / f"{step.name}.xml")
    if exit_code == 0 or (exit_code == 1 and record.get("failed_tests") == []):
        return record | {"state": "done"}
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    state, why = "failed", f"exit code {exit_code}"
    if exit_code is None:
        state, why = "late", f"took longer than {limit_seconds:.0f} s"
    return record | {"state": state, "why": why, "last_lines": lines}


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


def _run(command: list[str], log: Path, limit_seconds: float) -> int | None:
    """The exit code; None where the limit came first."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ) | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
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


def _tests(report: Path) -> Record:
    """What pytest's report tells: how many passed, which failed, and why others were skipped. A file that cannot be
    imported because a module is not installed counts as skipped."""
    if not report.is_file():
        return {}
    failed, skipped, passed = [], {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        name, trouble = f"{case.get('classname')}.{case.get('name')}", case.find("failure")
        error, skip = case.find("error"), case.find("skipped")
        absent = ABSENT.search(error.text or "") if error is not None else None
        if skip is not None or absent:
            skipped[name] = absent.group() if absent else (skip.get("message", "") if skip is not None else "")
        elif trouble is not None or error is not None:
            failed.append(name)
        else:
            passed += 1
    counts = {"passed": passed, "failed": len(failed), "skipped": len(skipped)}
    return {"tests": counts, "failed_tests": failed, "skipped_tests": skipped}
