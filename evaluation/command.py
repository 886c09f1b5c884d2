"""Shared parts of the evaluation's commands: ranks under a launcher, errors, options, output folder, progress bar.

def main(arguments):
    given = parser.parse_args(arguments)
    return run_command(lambda: show(evaluate(given.source)))     # 0, or 2 after "error: ..." on stderr

for batch in with_progress(images.batches(128), "evaluating", total=79): ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.progress import track

from configs import UserError
from engine import distributed
from engine.launcher import end_with_launcher
from engine.stderr import ignore_output_errors

TIMEOUT_MINUTES = 240  # of collectives: the other ranks wait while the first trains probes


def run_command(work: Callable[[], None]) -> int:
    """Run `work` on the ranks that a launcher started, or alone, and return the exit code.

    A UserError is printed by the first rank and gives 2.
    """
    ignore_output_errors()
    end_with_launcher()
    is_launched = "RANK" in os.environ
    try:
        if is_launched:
            distributed.start(TIMEOUT_MINUTES)
        work()
    except UserError as error:
        if distributed.is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if is_launched:
            distributed.stop()
    return 0


def create_output_folder(folder: Path) -> Path:
    """Create the directory for results and return it. Raises UserError, before any work, if it cannot be written."""
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
    """Raise UserError if an option of these names is given and below 1."""
    for name in names:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: give a number from 1 on")


def with_progress(items: Iterable, title: str, total: int) -> Iterable:
    """Yield the items, with a progress bar on the first rank if stdout is a terminal."""
    return track(items, title, total=total, disable=not (sys.stdout.isatty() and distributed.is_first()))
