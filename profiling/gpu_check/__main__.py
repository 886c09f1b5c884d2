"""python -m profiling.gpu_check --out DIR [--run 1|2|3] [--only NAMES]: run all GPU tests and benches.

Tests marked `gpu` and benches at a GPU's sizes, the most telling first, in three runs: the first two take five and a
half minutes each, the third the rest. Needs no network and no installation beyond the packages that are there, names
those that are missing, and goes on with the rest. DIR gets a log and the figures of every step, summary.json and
page.md, all rewritten whenever something is known. Without a GPU it is a dry run: every step runs on the CPU at a small
size, tests that need a GPU are skipped, and no figure is of a GPU.

Exit code 0: every step ended well or was left out, with its reason; 1: one failed or took too long; 2: a mistake in the
command line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data.durable_files import write_atomic
from profiling.gpu_check.page import bench_tables, page
from profiling.gpu_check.runner import (
    Record,
    pack_caches,
    remove_old_files,
    run_step,
    running_record,
    summary,
    unpack_caches,
)
from profiling.gpu_check.steps import RUNS, STEPS, CheckStep, steps_of

MIN_SECONDS = 15.0  # a step with less time than this is not started
PACKAGES = ("torch", "triton", "deepspeed", "torchao", "transformer-engine", "flash-attn-3", "nvidia-dali-cuda130")
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,temperature.gpu"


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    given = _parser().parse_args(arguments)
    if mistake := _mistake(given):
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    chosen = [step for step in steps_of(given.run) if given.only is None or step.name in given.only.split(",")]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the step that runs, too
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        remove_old_files(step, out)
    gpu = _gpu()
    print(f"on {gpu}" if gpu else "no GPU here: a dry run on the CPU, whose figures are not of a GPU", flush=True)
    seconds = 60 * given.minutes if given.minutes else sum(step.seconds for step in chosen) if gpu else math.inf
    deadline = time.monotonic() + seconds
    caches = None if given.caches is None else unpack_caches(given.caches)
    records: list[Record] = []
    for idx, step in enumerate(chosen):
        _write(out, gpu, [*records, running_record(step)])  # now: whatever ends this command, this is known
        limit = step.dry if gpu is None else _limit(chosen[idx:], deadline - time.monotonic())
        records.append(_record(step, out, min(limit, deadline - time.monotonic()), gpu is None, caches))
        _write(out, gpu, records)
        print(f"{step.name}: {summary(records[-1])}", bench_tables(records[-1], out), sep="\n", flush=True)
    if caches is not None:
        print(f"compiler caches: {pack_caches(caches, given.caches) / 2**20:.1f} MiB in {given.caches}", flush=True)
    return 1 if any(record["state"] in ("failed", "late") for record in records) else 0


def _limit(steps: list[CheckStep], left: float) -> float:
    """Seconds for the first of `steps`: its own, and what the steps before it have not used."""
    return max(steps[0].seconds, left - sum(step.seconds for step in steps[1:]))


def _mistake(given: argparse.Namespace) -> str | None:
    names = [step.name for step in steps_of(given.run)]
    if given.only is not None and not set(given.only.split(",")) <= set(names):
        of_run = "" if given.run is None else f" of run {given.run}"
        return f"--only {given.only}: the steps{of_run} are {', '.join(names)}"
    if given.minutes is not None and not given.minutes > 0:
        return f"--minutes {given.minutes:g}: give a number above 0"
    return None


def _record(step: CheckStep, out: Path, limit: float, is_dry: bool, caches: Path | None) -> Record:
    if limit < MIN_SECONDS:
        return {"step": step.name, "question": step.question, "state": "left out", "why": "no time was left"}
    return run_step(step, out, limit, is_dry, caches)


def _write(out: Path, gpu: str | None, records: list[Record]) -> None:
    facts = {"gpu": gpu, "packages": dict(_versions()), "records": records}
    write_atomic(out / "summary.json", json.dumps(facts, indent=2) + "\n", is_synced=False)
    write_atomic(out / "page.md", page(facts, out), is_synced=False)


def _versions() -> Iterator[tuple[str, str]]:
    """Versions of Python and of the installed packages that figures depend on."""
    yield "Python", platform.python_version()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _gpu() -> str | None:
    """Name, driver, clocks and power limit of the first GPU, by nvidia-smi; None if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
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
    parser.add_argument("--run", type=int, choices=RUNS, help="only the steps of this run (default: all)")
    parser.add_argument("--only", metavar="NAMES", help=f"with commas between them: {', '.join(s.name for s in STEPS)}")
    parser.add_argument("--minutes", type=float, help="for all steps together (default: on a GPU the sum of theirs)")
    parser.add_argument(
        "--caches", type=Path, metavar="FILE",
        help="what compilers made: taken from this .tar.gz where it exists, and packed into it at the end",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
