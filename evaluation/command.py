"""What the commands of this package have in common: ranks where a launcher started them, one line for a mistake.

def main(arguments):
    given = parser.parse_args(arguments)
    return run_command(lambda: show(evaluate(given.source)))     # 0, or 2 after "error: ..." on stderr

for batch in with_progress(pictures.batches(128), "evaluating", total=79): ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.progress import track

from configs import UserError
from engine import world
from engine.complaint import ignore_output_errors
from engine.launcher import end_with_launcher

TIMEOUT_MINUTES = 240  # while the first rank learns, the others wait


def run_command(work: Callable[[], None]) -> int:
    """`work` among the ranks that a launcher started, or alone; the exit code. The first rank says what is wrong."""
    ignore_output_errors()
    end_with_launcher()
    is_launched = "RANK" in os.environ
    try:
        if is_launched:
            world.start(TIMEOUT_MINUTES)
        work()
    except UserError as error:
        if world.is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if is_launched:
            world.stop()
    return 0


def made(folder: Path) -> Path:
    """The directory for results, there from now on. Raises UserError where it cannot be: before hours, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be made a directory ({error.strerror}): results are files in one; choose another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder} cannot be written to: results are files in it; choose another with --out")
    return folder


def check_counts(given: argparse.Namespace, *names: str) -> None:
    """Raises UserError where an option of these names is given and below 1."""
    for name in names:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: give a number from 1 on")


def with_progress(items: Iterable, title: str, total: int) -> Iterable:
    """The items, with a bar where somebody looks."""
    return track(items, title, total=total, disable=not (sys.stdout.isatty() and world.is_first()))
