"""pytest plugin: a line of JSON for every test, written the moment its outcome is known.

    pytest -p profiling.gpu_check.outcomes --outcomes FILE ...
    read(FILE)      # {"tests": {"passed": 3, ...}, "failed_tests": {"a.py::test_b": "assert 1 == 2"}, "running": ...}

A run that is ended, or whose process dies, leaves which tests had passed and failed, and which one was running.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNNING = "running"
LONGEST_REASON = 400  # characters


def pytest_addoption(parser: Any) -> None:
    """pytest calls it."""
    parser.addoption("--outcomes", metavar="FILE", help="a line of JSON for every test, as it ends")


def pytest_configure(config: Any) -> None:
    """pytest calls it."""
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(Path(config.getoption("--outcomes"))))


class Outcomes:
    """Pytest plugin: write one JSON line to `file` as each test starts and ends."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._write(nodeid, RUNNING)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Set-up, call or end of a test: the call, or what went wrong around it."""
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, report.duration, _reason(report))

    def pytest_collectreport(self, report: Any) -> None:
        """A file whose tests could not be collected."""
        if not report.passed:
            self._write(report.nodeid, report.outcome, 0.0, _reason(report))

    def _write(self, test: str, outcome: str, seconds: float = 0.0, why: str = "") -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": why}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _reason(report: Any) -> str:
    """In a line: of a skipped test its reason, of a failed one the error."""
    found = report.longrepr
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    said = crash.message if crash is not None else str(found or "").strip().rpartition("\n")[2]
    return " ".join(said.split())[:LONGEST_REASON]


def read(file: Path) -> dict[str, Any]:
    """Tests by outcome, with seconds or reasons, and the one that was running at the end; {} without a file."""
    if not file.is_file():
        return {}
    last: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # the process ended while it wrote
            continue
        before = last.get(found["test"])
        if before is None or before["outcome"] != "failed":  # an end that went well mends no failure
            last[found["test"]] = found
    kinds = {
        kind: [each for each in last.values() if each["outcome"] == kind] for kind in ("passed", "failed", "skipped")
    }
    running = [test for test, each in last.items() if each["outcome"] == RUNNING]
    return {
        "tests": {kind: len(found) for kind, found in kinds.items()},
        "passed_tests": {each["test"]: each["seconds"] for each in kinds["passed"]},
        "failed_tests": {each["test"]: each["why"] for each in kinds["failed"]},
        "skipped_tests": {each["test"]: each["why"] for each in kinds["skipped"]},
        "running": running[-1] if running else None,
    }
