"""Metrics of one run or of two, as a table and as plots.

metric_table([run], ["loss/clip"])            # first, median, last
metric_table([run, other], ["loss/clip"])     # last of each, and the second over the first
metric_plots([run, other], ["loss/clip"], is_from_zero=False)
"""

from __future__ import annotations

import math

from profiling.report.blocks import Cell, LinePlot, Paragraph, PlotGrid, PlotLine, ReportBlock, ReportTable
from profiling.report.run_record import RunRecord

MAX_POINTS = 500  # of a line; a plot is 400 pixels wide


def labels(runs: list[RunRecord]) -> list[str]:
    """A short name for each run: its directory's, or the whole path where two directories have the same name."""
    names = [run.directory.resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.directory) for run in runs]


def labelled(runs: list[RunRecord]) -> list[tuple[RunRecord, str]]:
    """Each run with its label."""
    return list(zip(runs, labels(runs), strict=True))


def metric_table(runs: list[RunRecord], keys: list[str]) -> ReportTable:
    """One run: first, median, last. Two: both last values and the second over the first."""
    if len(runs) == 1:
        rows: list[list[Cell]] = [[key, runs[0].first(key), runs[0].median(key), runs[0].last(key)] for key in keys]
        return ReportTable("Over all reports", ["figure", "first", "median", "last"], rows)
    return side_by_side("Last report", runs, {key: [run.last(key) for run in runs] for key in keys})


def side_by_side(caption: str, runs: list[RunRecord], rows: dict[str, list[Cell]]) -> ReportTable:
    """A table with a column for each run; for two, also the second over the first, where both are numbers."""
    header, ratios = ["", *labels(runs)], [_ratio(*cells) for cells in rows.values()] if len(runs) == 2 else []
    filled: list[list[Cell]] = [[name, *cells] for name, cells in rows.items()]
    if all(ratio is None for ratio in ratios):
        return ReportTable(caption, header, filled)
    with_ratios = [[*row, ratio] for row, ratio in zip(filled, ratios, strict=True)]
    return ReportTable(caption, [*header, f"{header[2]} / {header[1]}"], with_ratios)


def metric_plots(runs: list[RunRecord], keys: list[str], is_from_zero: bool) -> list[ReportBlock]:
    """A plot for each metric, with a line for each run."""
    drawn = [
        LinePlot(key, [thinned(_line(run, name, key)) for run, name in labelled(runs)], is_from_zero)
        for key in keys
        if _varies(runs, key) and not key.endswith(("/rank", "_rank"))  # a rank's number is a name, no quantity
    ]
    return [PlotGrid(drawn)] if drawn else []


def thinned(line: PlotLine) -> PlotLine:
    """At most MAX_POINTS points, evenly spaced, the last one included."""
    stride = max(1, -(-len(line.steps) // MAX_POINTS))
    kept = slice((len(line.steps) - 1) % stride, None, stride)
    return PlotLine(line.label, line.steps[kept], line.values[kept])


def remarks(runs: list[RunRecord], keys: list[str]) -> list[ReportBlock]:
    """Sentences on partly reported metrics, non-finite values, metrics not plotted, and thinned points."""
    sentences = [_partly_reported(run, name, keys) for run, name in labelled(runs)]
    sentences += [_not_finite(run, name, key) for key in keys for run, name in labelled(runs)]
    if flat := [key for key in keys if not _varies(runs, key)]:
        sentences.append(f"Not plotted, for want of two different values: {', '.join(flat)}.")
    if (most := max(len(run.steps) for run in runs)) > MAX_POINTS:
        sentences.append(f"Of {most:,} reports the plots show at most {MAX_POINTS}, evenly spaced, and the last.")
    return [Paragraph(text) for text in sentences if text]


def _line(run: RunRecord, label: str, key: str) -> PlotLine:
    """The metric in the reports that have it: it may be measured in every tenth report only."""
    points = [(step, value) for step, value in zip(run.steps, run.series(key), strict=True) if value is not None]
    return PlotLine(label, [step for step, _ in points], [value for _, value in points])


def _varies(runs: list[RunRecord], key: str) -> bool:
    return len({value for run in runs for value in run.finite(key)}) > 1


def _partly_reported(run: RunRecord, label: str, keys: list[str]) -> str:
    """A sentence on the metrics that are in some reports only; "" where there are none."""
    counts = {key: sum(value is not None for value in run.series(key)) for key in keys}
    names: dict[int, list[str]] = {}
    for key, count in counts.items():
        if 0 < count < len(run.steps):
            names.setdefault(count, []).append(key)
    parts = [f"{', '.join(keys_of_count)} in {count:,}" for count, keys_of_count in sorted(names.items())]
    return f"Not in every one of the {len(run.steps):,} reports of {label}: {'; '.join(parts)}." if parts else ""


def _not_finite(run: RunRecord, label: str, key: str) -> str:
    """A sentence on values that are NaN or infinite; "" where there are none."""
    series = zip(run.steps, run.series(key), strict=True)
    bad = [step for step, value in series if value is not None and not math.isfinite(value)]
    if not bad:
        return ""
    return f"{key} of {label} is not finite in {len(bad)} of {len(run.steps)} reports, first at step {bad[0]:,}."


def _ratio(first: Cell, second: Cell) -> float | None:
    if not (isinstance(first, int | float) and isinstance(second, int | float)) or first == 0:
        return None
    return second / first if math.isfinite(first) and math.isfinite(second) else None
