"""python -m evaluation.study --preset mini --out runs/study: what more pre-training compute buys, by objective.

Trains a tokenizer for every objective and every budget of compute, judges it, and trains the same generator on its
latents. What is done is skipped, what was cut off goes on, and the command may run any number of times at once on the
same directory: they share the cells. A machine with two cores is used best by two of them:

    python -m evaluation.study --preset mini --out runs/study &
    python -m evaluation.study --preset mini --out runs/study

Machines that share no disk share a study by what they publish: `--publish DIR` writes the figures and the feature
network that measured them; `--known DIR`, on another machine, counts those cells as done and measures the rest with the
same network.

Leaves results.json and figures/ in --out; `--page docs/scaling_study.md` writes the page of results from what is there.
Exit code 0: all that was asked for is done, or in another process's hands; 1: a cell failed (see its log) or is not
done; 2: a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from configs import UserError
from configs.command_line import CommandParser, output_file
from evaluation.study import results
from evaluation.study.answer import answer
from evaluation.study.carry_out import Session
from evaluation.study.known import Known, publish, read_known
from evaluation.study.overview import overview
from evaluation.study.page import draw, write_page
from evaluation.study.preset import PRESETS, Cell, cells
from evaluation.study.stages import Layout
from evaluation.study.work import Tally, work


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        layout = _layout(given)
        everything = cells(layout.preset)
        chosen, known = _chosen(everything, given.only), read_known(given.known, layout, everything)
        if given.dry_run:
            Console().print(overview(layout, chosen, given.threads, known.rows))
            return 0

        def record() -> dict[str, Any]:
            return _record(layout, everything, known)

        tally = Tally()
        if not given.page_only:
            signal.signal(signal.SIGTERM, _interrupt)
            missing = [cell for cell in chosen if cell.name not in known.rows]
            tally = work(layout, missing, _session(given), _say, record, lambda: known.adopt(layout))
        found = record()
        if given.page:
            write_page(layout, found, everything, given.page)
        if given.publish:
            publish(layout, found, given.publish)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return _report(tally, found)


def _record(layout: Layout, everything: list[Cell], known: Known) -> dict[str, Any]:
    """Writes results.json and the figures; what is in them."""
    layout.out.mkdir(parents=True, exist_ok=True)
    found = results.collect(layout, everything, known)
    results.write(layout.out / "results.json", found)
    draw(found, layout.out / "figures")
    return found


def _report(tally: Tally, found: dict[str, Any]) -> int:
    for sentence in answer(found["cells"]):
        print(sentence)
    for what, names in vars(tally).items():
        if names:
            print(f"{what}: {', '.join(names)}")
    return 1 if tally.failed or tally.stopped else 0


def _layout(given: argparse.Namespace) -> Layout:
    for name in ("ranks", "threads", "limit_minutes"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    return Layout(given.out.absolute(), PRESETS[given.preset], given.ranks)


def _session(given: argparse.Namespace) -> Session:
    deadline = None if given.limit_minutes is None else time.monotonic() + 60 * given.limit_minutes
    return Session(deadline, given.threads)


def _chosen(everything: list[Cell], patterns: str | None) -> list[Cell]:
    """The cells that a comma-separated list of names and globs names."""
    if patterns is None:
        return everything
    found = []
    for pattern in patterns.split(","):
        named = [cell for cell in everything if fnmatch.fnmatchcase(cell.name, pattern)]
        if not named:
            raise UserError(f"--only {pattern}: no such cell; they are {', '.join(cell.name for cell in everything)}")
        found += named
    return [cell for cell in everything if cell in found]


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m evaluation.study", description="What more pre-training compute buys, by objective."
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="mini", help="which study (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything of it lies")
    add("--only", metavar="CELLS", help="names of cells with commas between them, or globs: 'joint-*,rec-0'")
    add("--limit-minutes", type=float, help="stop cleanly after so long; the same command goes on from there")
    add("--ranks", type=int, default=1, help="ranks of a training (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of a rank, or of an evaluation (default: %(default)s)")
    add("--dry-run", action="store_true", help="only show the cells, their FLOPs, their state and the time they need")
    add(
        "--page",
        type=output_file,
        metavar="FILE",
        help="write the page of results, and its pictures below images/study/",
    )
    add(
        "--known",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="cells measured elsewhere, as --publish wrote them",
    )
    add("--publish", type=Path, metavar="DIR", help="write there what --known reads")
    add("--page-only", action="store_true", help="start nothing: results, figures and page of what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
