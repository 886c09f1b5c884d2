"""python -m evaluation.study.compare THERE HERE: compare the FIDs of two pages of the same study.

THERE and HERE are pages that `python -m evaluation.study --page` wrote, of two machines, two seeds or two versions.
Prints, for every column of FID, figure here over figure there of the cells that both have; and on each page, budget by
budget, gFID of the joint objective over that of reconstruction alone, which is the answer that should be the same.

Standard deviations are of those quotients. Exit code 0; 2 for a page without such a table, or two without a cell in
common.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

from configs import UserError
from configs.command_line import CommandParser
from evaluation.study.cells import JOINT, OBJECTIVES, REC
from evaluation.study.page import COLUMNS

FID = ("gfid", "gfid_guided", "rfid")
CELL = ("objective", "FLOPs")  # the columns that name one
Cells = Mapping[tuple[str, str], Mapping[str, float]]


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    parser = CommandParser(prog="python -m evaluation.study.compare", description=__doc__.split("\n")[0])
    parser.add_argument("there", type=Path, help="a page of the study")
    parser.add_argument("here", type=Path, help="another")
    given = parser.parse_args(arguments)
    try:
        print("\n".join(comparison_lines(read_cells(given.there), read_cells(given.here))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_cells(page: Path) -> Cells:
    """Read a page's table "Every cell": (objective, FLOPs), as written there, -> its FIDs.

    Raises UserError where there is no such page or table.
    """
    try:
        lines = iter(page.read_text().splitlines())
    except OSError as error:
        raise UserError(f"{page} cannot be read ({error.strerror}): give a page of the study") from None
    header: list[str] = next((_split_row(line) for line in lines if line.startswith(f"| {CELL[0]} |")), [])
    next(lines, "")  # the rule below the header
    rows = [
        dict(zip(header, _split_row(line), strict=False))
        for line in takewhile(lambda line: line.startswith("|"), lines)
    ]
    titles = {COLUMNS[figure][0]: figure for figure in FID}
    if not rows or not {*CELL, *titles} <= {*header}:
        raise UserError(f"{page} has no table of cells: give a page that python -m evaluation.study --page has written")
    try:
        return {
            (row[CELL[0]], row[CELL[1]]): {titles[name]: float(row[name]) for name in titles if row[name]}
            for row in rows
        }
    except (ValueError, KeyError) as error:
        raise UserError(f"{page}: a row of its table is broken ({error}): write the page again") from None


def comparison_lines(there: Cells, here: Cells) -> Iterator[str]:
    """Yield the lines of the comparison, in Markdown. Raises UserError if no cell is on both pages."""
    both = [cell for cell in there if cell in here]
    if not both:
        raise UserError("the two pages have no cell in common: give pages of the same preset")
    yield from ("| here / there | cells | median | standard deviation | from, to |", "|---|---:|---:|---:|---:|")
    for figure in FID:
        quotients = [here[c][figure] / there[c][figure] for c in both if figure in here[c] and figure in there[c]]
        if quotients:
            yield _line(COLUMNS[figure][0], quotients)
    yield from ("", "gFID of the joint objective over that of reconstruction alone, by budget:", "")
    for name, cells in {"there": there, "here": here}.items():
        yield f"- {name}: " + ", ".join(f"{quotient:.2f}" for quotient in _joint_over_rec(cells))


def _line(title: str, quotients: list[float]) -> str:
    spread = statistics.pstdev(quotients)
    ends = f"{min(quotients):.2f}, {max(quotients):.2f}"
    return f"| {title} | {len(quotients)} | {statistics.median(quotients):.2f} | {spread:.2f} | {ends} |"


def _joint_over_rec(cells: Cells) -> Iterator[float]:
    titles = {objective.name: objective.title for objective in OBJECTIVES}
    for budget in dict.fromkeys(flops for _, flops in cells):
        joint, rec = (cells.get((titles[name], budget), {}).get("gfid") for name in (JOINT, REC))
        if joint is not None and rec is not None:
            yield joint / rec


def _split_row(line: str) -> list[str]:
    return [part.strip() for part in line.strip().strip("|").split("|")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
