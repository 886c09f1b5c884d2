"""Run one step of the GPU check: in a process of its own, with a log of its own, and a record of how it ended.

    record = run_step(step, Path("gpu_check"), limit_seconds=60)
    record["state"]        # "done", "failed", "late" (killed for taking too long), "left out" (no time, or no module)

A process of its own, because an illegal access ends all that the process does with the GPU; killed with everything it
started, because a rank that hangs would keep the memory that the next step needs.

Also a pytest plugin, which writes a line of JSON for every test as soon as its outcome is known:

    pytest -p profiling.gpu_check.runner --outcomes FILE ...
    read_outcomes(FILE)      # {"tests": {"passed": 3, ...}, "failed_tests": {"a.py::test_b": "assert 1 == 2"}, ...}

A run that is killed, or whose process dies, leaves which tests had passed and failed, and which one was running.
"""

from __future__ import annotations

import importlib.util
import json
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

from profiling.gpu_check.steps import CheckStep

RUNNING = "running"
MAX_REASON = 400  # characters


def pytest_addoption(parser: Any) -> None:
    """Hook of pytest."""
    parser.addoption("--outcomes", metavar="FILE", help="a line of JSON for every test, as it ends")


def pytest_configure(config: Any) -> None:
    """Hook of pytest."""
    if config.getoption("--outcomes"):
        config.pluginmanager.register(OutcomeWriter(Path(config.getoption("--outcomes"))))


class OutcomeWriter:
    """Pytest plugin: write one JSON line to `file` as each test starts and ends."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Hook of pytest: a test begins."""
        self._write(nodeid, RUNNING)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Hook of pytest: set-up, call or teardown of a test; write the call, or an error around it."""
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, report.duration, _reason(report))

    def pytest_collectreport(self, report: Any) -> None:
        """Hook of pytest: write a file whose tests could not be collected."""
        if not report.passed:
            self._write(report.nodeid, report.outcome, 0.0, _reason(report))

    def _write(self, test: str, outcome: str, seconds: float = 0.0, why: str = "") -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": why}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _reason(report: Any) -> str:
    """One line: the reason of a skipped test, the error of a failed one."""
    found = report.longrepr
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    text = crash.message if crash is not None else str(found or "").strip().rpartition("\n")[2]
    return " ".join(text.split())[:MAX_REASON]


def read_outcomes(file: Path) -> dict[str, Any]:
    """Tests by outcome, with seconds or reasons, and the one that was running at the end; {} if there is no file."""
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


ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12  # of a log, kept for a step that failed
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
Record = dict[str, Any]


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that are not installed; imports none of them."""
    return [module for module in modules if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent package, or one half taken out
        return False


def run_step(
    step: CheckStep, out: Path, limit_seconds: float, is_dry: bool = False, caches: Path | None = None
) -> Record:
    """Run a step and return its record; output goes to out/{step}.log. `caches`: folder of the compilers' caches."""
    record = running_record(step)
    if lacking := missing(step.needs):
        return record | {"state": "left out", "why": f"not installed: {', '.join(lacking)}"}
    log = out / f"{step.name}.log"
    command = [sys.executable, *step.command_line(str(out), is_dry)]
    begin = time.monotonic()
    exit_code = _run(command, log, limit_seconds, caches)
    record |= {"command": command[1:], "seconds": time.monotonic() - begin, "exit_code": exit_code}
    record |= {"limit_seconds": limit_seconds, **read_outcomes(out / f"{step.name}.tests")}
    if exit_code in step.good_exit_codes:
        return record | {"state": "done"}
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    state, why = "failed", f"exit code {exit_code}"
    if exit_code is None:
        state, why = "late", f"took longer than {limit_seconds:.0f} s"
    if record.get("running"):
        why += f" in {record['running']}"
    return record | {"state": state, "why": why, "last_lines": lines}


def running_record(step: CheckStep) -> Record:
    """The record of a step that is running: what is left if the check is killed meanwhile."""
    return {"step": step.name, "question": step.question, "without": missing(step.optional), "state": "running"}


def summary(record: Record) -> str:
    """How a step ended, in words."""
    seconds = f"after {record['seconds']:.0f} s" if "seconds" in record else ""
    counts = ", ".join(f"{count} {what}" for what, count in record.get("tests", {}).items())
    without = f"without {', '.join(record['without'])}" if record.get("without") else ""
    return "; ".join(filter(None, (f"{record['state']} {seconds}".strip(), record.get("why"), counts, without)))


def remove_old_files(step: CheckStep, out: Path) -> None:
    """Remove what an earlier check in the same folder left of a step."""
    for file in out.glob(f"{step.name}.*"):
        file.unlink()


def unpack_caches(archive: Path) -> Path:
    """Unpack the regular files of `archive`, if it exists, into the compilers' cache folder; return the folder."""
    folder = Path(tempfile.gettempdir()) / "vtp_engine_compiler_caches"
    folder.mkdir(exist_ok=True)
    archive.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is an error now, not at the end
    if archive.is_file():
        # By hand: TarFile.extractall has its filter from Python 3.10.12 and 3.11.4 on.
        with tarfile.open(archive) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                file, path = tar.extractfile(member), (folder / member.name).resolve()
                if file is not None and path.is_relative_to(folder.resolve()):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(file.read())
                    path.chmod(member.mode & 0o755)
    return folder


def pack_caches(caches: Path, archive: Path) -> int:
    """Write the folder's content into a .tar.gz; return its size in bytes."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(caches, ".")
    return archive.stat().st_size


def _run(command: list[str], log: Path, limit_seconds: float, caches: Path | None) -> int | None:
    """Return the exit code; None where the time limit came first."""
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
