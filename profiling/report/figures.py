"""Figures of one run or of two, as a table and as plots.

figures([run], ["loss/clip"])            # a table: first, median, last
figures([run, other], ["loss/clip"])     # a table: last of each, and the second over the first
plots([run, other], ["loss/clip"], is_from_zero=False)
"""

from __future__ import annotations

import math

from profiling.report.blocks import Block, Cell, Line, Plot, Plots, Sentence, Table
from profiling.report.data import Run

MOST_POINTS = 500  # of a line; a plot is 400 pixels wide


def labels(runs: list[Run]) -> list[str]:
    """A short name a run: its directory's, or the whole path where two directories are called the same."""
    names = [run.directory.resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.directory) for run in runs]


def figures(runs: list[Run], keys: list[str]) -> Table:
    """One run: first, median, last. Two: both last figures and the second over the first."""
    if len(runs) == 1:
        rows: list[list[Cell]] = [[key, runs[0].first(key), runs[0].median(key), runs[0].last(key)] for key in keys]
        return Table("Over all reports", ["figure", "first", "median", "last"], rows)
    return side_by_side("Last report", runs, {key: [run.last(key) for run in runs] for key in keys})


def side_by_side(caption: str, runs: list[Run], rows: dict[str, list[Cell]]) -> Table:
    """One column a run; for two, the second over the first behind, where there are such figures."""
    header, ratios = ["", *labels(runs)], [_ratio(*cells) for cells in rows.values()] if len(runs) == 2 else []
    filled: list[list[Cell]] = [[name, *cells] for name, cells in rows.items()]
    if all(ratio is None for ratio in ratios):
        return Table(caption, header, filled)
    with_ratios = [[*row, ratio] for row, ratio in zip(filled, ratios, strict=True)]
    return Table(caption, [*header, f"{header[2]} / {header[1]}"], with_ratios)


def plots(runs: list[Run], keys: list[str], is_from_zero: bool) -> list[Block]:
    """A plot a figure, with a line a run."""
    drawn = [
        Plot(key, [thinned(_line(run, name, key)) for run, name in _named(runs)], is_from_zero)
        for key in keys
        if _varies(runs, key) and not key.endswith(("/rank", "_rank"))  # which rank it was is a name, no quantity
    ]
    return [Plots(drawn)] if drawn else []


def remarks(runs: list[Run], keys: list[str]) -> list[Block]:
    """Write sentences on partly reported figures, non-finite values, figures not plotted, and thinned points."""
    sentences = [_partly_reported(run, name, keys) for run, name in _named(runs)]
    sentences += [_not_finite(run, name, key) for key in keys for run, name in _named(runs)]
    if flat := [key for key in keys if not _varies(runs, key)]:
        sentences.append(f"Not plotted, for want of two different values: {', '.join(flat)}.")
    if (most := max(len(run.steps) for run in runs)) > MOST_POINTS:
        sentences.append(f"Of {most:,} reports the plots show at most {MOST_POINTS}, evenly taken, and the last.")
    return [Sentence(text) for text in sentences if text]


def _line(run: Run, label: str, key: str) -> Line:
    """Make a figure's line from the reports that have it: it may be measured in every tenth report only."""
    points = [(step, value) for step, value in zip(run.steps, run.series(key), strict=True) if value is not None]
    return Line(label, [step for step, _ in points], [value for _, value in points])


def _named(runs: list[Run]) -> list[tuple[Run, str]]:
    return list(zip(runs, labels(runs), strict=True))


def _varies(runs: list[Run], key: str) -> bool:
    return len({value for run in runs for value in run.finite(key)}) > 1


def thinned(line: Line) -> Line:
    """At most MOST_POINTS points, evenly taken, the last one kept."""
    stride = max(1, -(-len(line.steps) // MOST_POINTS))
    kept = slice((len(line.steps) - 1) % stride, None, stride)
    return Line(line.label, line.steps[kept], line.values[kept])


def _partly_reported(run: Run, label: str, keys: list[str]) -> str:
    """Write a sentence on the figures that are in some reports only; "" where there are none."""
    counts = {key: sum(value is not None for value in run.series(key)) for key in keys}
    names: dict[int, list[str]] = {}
    for key, count in counts.items():
        if 0 < count < len(run.steps):
            names.setdefault(count, []).append(key)
    parts = [f"{', '.join(keys_of_count)} in {count:,}" for count, keys_of_count in sorted(names.items())]
    return f"Not in every one of the {len(run.steps):,} reports of {label}: {'; '.join(parts)}." if parts else ""


def _not_finite(run: Run, label: str, key: str) -> str:
    """Write a sentence on values that are NaN or infinite; "" where there are none."""
    values = run.series(key)
    bad = [
        step for step, value in zip(run.steps, values, strict=True) if value is not None and not math.isfinite(value)
    ]
    if not bad:
        return ""
    return f"{key} of {label} is not finite in {len(bad)} of {len(values)} reports, first at step {bad[0]:,}."


def _ratio(first: Cell, second: Cell) -> float | None:
    if not (isinstance(first, int | float) and isinstance(second, int | float)) or first == 0:
        return None
    return second / first if math.isfinite(first) and math.isfinite(second) else None
