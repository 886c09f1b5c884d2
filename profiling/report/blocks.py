"""Blocks that a report consists of. The page and report.json are two views of the same blocks, so they cannot disagree.

ReportSection("losses", "Losses", [PlotGrid([LinePlot("loss/clip", [PlotLine("demo", [10, 20], [4.5, 3.9])])])])
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str
    kind: str = "sentence"


@dataclass(frozen=True)
class ReportTable:
    """A table; each row's first cell is its header. None: the run has no such value."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class PlotLine:
    """One run's line in a plot."""

    label: str  # the run
    steps: list[int]
    values: list[float | None]  # None is a gap


@dataclass(frozen=True)
class LinePlot:
    """One metric over the steps, one line for each run."""

    title: str
    lines: list[PlotLine]
    is_from_zero: bool = False  # else from the smallest value


@dataclass(frozen=True)
class PlotGrid:
    """Plots beside one another with one legend."""

    plots: list[LinePlot]
    kind: str = "plots"


@dataclass(frozen=True)
class StackedBars:
    """One bar for each run, divided into named parts."""

    title: str
    unit: str
    labels: list[str]  # runs
    parts: dict[str, list[float]]  # name -> one value a run
    kind: str = "stack"


@dataclass(frozen=True)
class RooflinePlot:
    """A machine's roof over FLOPs a byte, and the parts of a step below it."""

    title: str
    flops_per_second: float
    bytes_per_second: float
    points: dict[str, tuple[float, float]]  # part -> FLOPs a byte, FLOP/s
    kind: str = "roofline"


@dataclass(frozen=True)
class ImageGallery:
    """PNG files, embedded in the page; report.json has their paths."""

    title: str
    captions: list[str]
    paths: list[Path]
    kind: str = "pictures"


@dataclass(frozen=True)
class TextListing:
    """Preformatted text. In a difference, lines begin with +, - or a blank."""

    title: str
    lines: list[str]
    is_difference: bool = False
    kind: str = "listing"


ReportBlock = Paragraph | ReportTable | PlotGrid | StackedBars | RooflinePlot | ImageGallery | TextListing


@dataclass(frozen=True)
class ReportSection:
    """A heading and the blocks below it."""

    name: str  # the anchor on the page
    title: str
    blocks: list[ReportBlock] = field(default_factory=list)


def as_json(title: str, sections: list[ReportSection]) -> str:
    """Strict JSON: NaN and infinities, which JSON does not have, become "NaN", "Infinity", "-Infinity"."""
    tree = {"title": title, "sections": [asdict(section) for section in sections]}
    return json.dumps(_strict(tree), indent=1, allow_nan=False) + "\n"


def format_cell(cell: Cell) -> str:
    """Format a cell for the page: four digits, thousands separated, a missing value as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(_strict(cell))
    if isinstance(cell, int) or 1000 <= abs(cell) < 1e15:
        return f"{cell:,.0f}"
    return f"{cell:.4g}"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value
