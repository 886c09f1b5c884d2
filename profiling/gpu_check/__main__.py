"""python -m profiling.gpu_check --out DIR [--minutes 9] [--only NAMES]: what was built for GPUs, shown to work on one.

Tests marked `gpu`, then benches at a GPU's sizes, the most telling first, within the given minutes; needs no network
and no installation beyond the packages that are there, tells which are missing, and goes on with the rest. DIR gets a
log and the figures of every step, summary.json and page.md. Without a GPU it is a dry run: every step runs on the CPU
at a small size, tests that need a GPU are skipped, and no figure says anything of a GPU.

Exit code 0: every step ended well or was left out, with its reason; 1: one failed or took too long; 2: a mistake in
what was asked.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from profiling.gpu_check.carry_out import Record, carry_out, forget, outcome
from profiling.gpu_check.page import page
from profiling.gpu_check.steps import STEPS, Step

MINUTES = 9.0
LEAST_SECONDS = 15.0  # a step with less time than this is not begun
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,temperature.gpu"


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    given = _parser().parse_args(arguments)
    if said := _mistake(given):
        print(f"error: {said}", file=sys.stderr)
        return 2
    chosen = [step for step in STEPS if given.only is None or step.name in given.only.split(",")]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the step that runs, too
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        forget(step, out)
    gpu = _gpu()
    print(f"on {gpu}" if gpu else "no GPU here: a dry run on the CPU, whose figures say nothing of a GPU", flush=True)
    minutes = given.minutes or (MINUTES if gpu else math.inf)
    deadline = time.monotonic() + 60 * minutes
    records: list[Record] = []
    for step in chosen:
        records.append(_record(step, out, deadline, is_dry=gpu is None))
        _write(out, gpu, records)  # at once: what is there is there, whatever ends this command
        print(f"{step.name}: {outcome(records[-1])}", flush=True)
    return 1 if any(record["state"] in ("failed", "late") for record in records) else 0


def _mistake(given: argparse.Namespace) -> str | None:
    names = [step.name for step in STEPS]
    if given.only is not None and not set(given.only.split(",")) <= set(names):
        return f"--only {given.only}: the steps are {', '.join(names)}"
    if given.minutes is not None and not given.minutes > 0:
        return f"--minutes {given.minutes:g}: give a number above 0"
    return None


def _record(step: Step, out: Path, deadline: float, is_dry: bool) -> Record:
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return {"step": step.name, "question": step.question, "state": "left out", "why": "no time was left"}
    return carry_out(step, out, min(left, step.dry if is_dry else step.seconds), is_dry)


def _write(out: Path, gpu: str | None, records: list[Record]) -> None:
    summary = {"gpu": gpu, "records": records}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "page.md").write_text(page(summary, out))


def _gpu() -> str | None:
    """Name, driver, clocks and power limit of the first GPU as its driver tells them; None where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None
    if found.returncode:
        return None
    pairs = zip(CLOCKS.split(","), found.stdout.strip().split(", "), strict=False)
    return ", ".join(value if key == "name" else f"{key} {value}" for key, value in pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where logs and figures go")
    parser.add_argument(
        "--minutes", type=float, help=f"for all of it (default: {MINUTES:g}; as many as it takes on a CPU)"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"with commas between them: {', '.join(s.name for s in STEPS)}")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
