"""python -m evaluation.study --preset mini --out runs/study: a scaling study of pre-training compute, by objective.

For every objective and compute budget: train a tokenizer, evaluate it, and train the same generator on its latents.
Finished stages are skipped, interrupted ones resumed, and the command may run any number of times at once on the same
directory: the processes share the cells. Two of them use a machine with two cores best:

    python -m evaluation.study --preset mini --out runs/study &
    python -m evaluation.study --preset mini --out runs/study

Machines that share no disk share a study through published cells: `--publish DIR` writes the results and the feature
network that measured them; `--known DIR`, on another machine, counts those cells as done and measures the rest with the
same network.

Writes results.json and figures/ in --out; `--page docs/scaling_study.md` writes the page of results. Exit code 0: every
requested cell is done, or being worked on by another process; 1: a cell failed (see its log) or is not done; 2: a
user error.
"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from configs import UserError
from configs.command_line import CommandParser, output_file
from evaluation.study import results
from evaluation.study.cells import PRESETS, Cell, Stage, StudyLayout, study_cells
from evaluation.study.page import answer, draw_figures, write_page
from evaluation.study.results import PublishedCells, cell_state, publish, read_published
from evaluation.study.runner import CellStates, WorkSession, is_done, read_record, run_cells


def overview_table(layout: StudyLayout, cells: Sequence[Cell], threads: int, known: Collection[str] = ()) -> Table:
    """Build the table of --dry-run: every cell with compute, state and the minutes that its missing stages may take.

    A tokenizer's time is its FLOPs over a rate; later stages take the same time in every cell. Both are measured on the
    finished cells, or the preset's without any. Minutes are for one process; cells in `known` need none.
    """
    rate, rest = _flops_per_second(layout, cells, threads), _stage_seconds(layout, cells, threads)
    title = f"{layout.preset.name}: {len(cells)} cells in {layout.out}, at {rate / 1e9:.0f} GFLOP a second"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("cell", footer="missing", no_wrap=True)  # what --only matches: never cut off
    table.add_column("learns from")
    for name in ("steps", "TFLOP"):
        table.add_column(name, justify="right")
    table.add_column("state")
    states = [("known" if cell.name in known else cell_state(layout, cell)) for cell in cells]
    minutes = [
        0.0 if state == "known" else _estimate_seconds(layout, cell, rate, rest) / 60
        for cell, state in zip(cells, states, strict=True)
    ]
    table.add_column("minutes", justify="right", footer=f"{sum(minutes):.0f}")
    for cell, state, needed in zip(cells, states, minutes, strict=True):
        table.add_row(
            cell.name, cell.objective.title, str(cell.steps), f"{cell.flops / 1e12:.1f}", state,
            f"{needed:.1f}" if needed else "",
        )  # fmt: skip
    return table


def _flops_per_second(layout: StudyLayout, cells: Sequence[Cell], threads: int) -> float:
    """Return the FLOPs a second of a tokenizer's training, start-up included."""
    flops = seconds = 0.0
    for cell in cells:
        tokenizer = layout.stages(cell)[0]
        if is_done(layout.cell(cell), tokenizer):
            flops += cell.flops
            seconds += _recorded_seconds(layout, cell, tokenizer)
    return flops / seconds if seconds else layout.preset.flops_per_second * threads * layout.ranks


def _stage_seconds(layout: StudyLayout, cells: Sequence[Cell], threads: int) -> dict[str, float]:
    """Return the seconds of each stage after the tokenizer."""
    found: dict[str, float] = {}
    for name, assumed in layout.preset.seconds.items():
        taken = [
            _recorded_seconds(layout, cell, stage)
            for cell in cells
            for stage in layout.stages(cell)
            if stage.name == name and is_done(layout.cell(cell), stage)
        ]
        found[name] = sum(taken) / len(taken) if taken else assumed / threads
    return found


def _estimate_seconds(layout: StudyLayout, cell: Cell, rate: float, rest: dict[str, float]) -> float:
    missing = [stage.name for stage in layout.stages(cell) if not is_done(layout.cell(cell), stage)]
    return sum(cell.flops / rate if name == "tokenizer" else rest[name] for name in missing)


def _recorded_seconds(layout: StudyLayout, cell: Cell, stage: Stage) -> float:
    seconds: float = read_record(layout.cell(cell), stage)["seconds"]
    return seconds


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        layout = _layout(given)
        everything = study_cells(layout.preset)
        chosen, known = _select_cells(everything, given.only), read_published(given.known, layout, everything)
        if given.dry_run:
            Console().print(overview_table(layout, chosen, given.threads, known.rows))
            return 0

        def record() -> dict[str, Any]:
            return _record(layout, everything, known)

        tally = CellStates()
        if not given.page_only:
            signal.signal(signal.SIGTERM, _interrupt)
            missing = [cell for cell in chosen if cell.name not in known.rows]
            tally = run_cells(layout, missing, _session(given), _say, record, lambda: known.adopt(layout))
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


def _record(layout: StudyLayout, everything: list[Cell], known: PublishedCells) -> dict[str, Any]:
    """Write results.json and the figures; return the content of results.json."""
    layout.out.mkdir(parents=True, exist_ok=True)
    found = results.collect_results(layout, everything, known)
    results.write_study_results(layout.out / "results.json", found)
    draw_figures(found, layout.out / "figures")
    return found


def _report(tally: CellStates, found: dict[str, Any]) -> int:
    for sentence in answer(found["cells"]):
        print(sentence)
    for what, names in vars(tally).items():
        if names:
            print(f"{what}: {', '.join(names)}")
    return 1 if tally.failed or tally.stopped else 0


def _layout(given: argparse.Namespace) -> StudyLayout:
    for name in ("ranks", "threads", "limit_minutes"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    return StudyLayout(given.out.absolute(), PRESETS[given.preset], given.ranks)


def _session(given: argparse.Namespace) -> WorkSession:
    deadline = None if given.limit_minutes is None else time.monotonic() + 60 * given.limit_minutes
    return WorkSession(deadline, given.threads)


def _select_cells(everything: list[Cell], patterns: str | None) -> list[Cell]:
    """Select cells by a comma-separated list of names and globs. Raises UserError for one that matches none."""
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
        prog="python -m evaluation.study", description="Scaling study of pre-training compute, by objective."
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="mini", help="which study (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the study")
    add("--only", metavar="CELLS", help="names of cells with commas between them, or globs: 'joint-*,rec-0'")
    add("--limit-minutes", type=float, help="stop cleanly after so long; the same command goes on from there")
    add("--ranks", type=int, default=1, help="ranks of a training (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of a rank, or of an evaluation (default: %(default)s)")
    add("--dry-run", action="store_true", help="show cells, FLOPs, states and estimated times only")
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
    add("--page-only", action="store_true", help="run nothing; write results, figures and page")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
