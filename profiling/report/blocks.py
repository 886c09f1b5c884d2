"""What a report is made of. The page and report.json are two views of the same blocks, so they cannot disagree.

Section("losses", "Losses", [Plots([Plot("loss/clip", [Line("demo", [10, 20], [4.5, 3.9])])])])
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Sentence:
    """A paragraph."""

    text: str
    kind: str = "sentence"


@dataclass(frozen=True)
class Table:
    """Each row's first cell is its header. None: the run has no such figure."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class Line:
    """One run's part of a plot."""

    label: str  # the run
    steps: list[int]
    values: list[float | None]  # None is a gap


@dataclass(frozen=True)
class Plot:
    """One figure over the steps, one line a run."""

    title: str
    lines: list[Line]
    is_from_zero: bool = False  # else from the smallest value


@dataclass(frozen=True)
class Plots:
    """Plots that stand beside one another and share a legend."""

    plots: list[Plot]
    kind: str = "plots"


@dataclass(frozen=True)
class Stack:
    """One bar a run, cut into named parts."""

    title: str
    unit: str
    labels: list[str]  # runs
    parts: dict[str, list[float]]  # name -> one value a run
    kind: str = "stack"


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at most at every number of FLOPs a byte, and where the parts of a step are below it."""

    title: str
    flops_per_second: float
    bytes_per_second: float
    points: dict[str, tuple[float, float]]  # part -> FLOPs a byte, FLOP/s
    kind: str = "roofline"


@dataclass(frozen=True)
class Pictures:
    """PNG files, inlined into the page; report.json names them."""

    title: str
    captions: list[str]
    paths: list[Path]
    kind: str = "pictures"


@dataclass(frozen=True)
class Listing:
    """Text as it is. In a difference, lines begin with +, - or a blank."""

    title: str
    lines: list[str]
    is_difference: bool = False
    kind: str = "listing"


Block = Sentence | Table | Plots | Stack | Roofline | Pictures | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    name: str  # the anchor on the page
    title: str
    blocks: list[Block] = field(default_factory=list)


def as_json(title: str, sections: list[Section]) -> str:
    """Strict JSON: NaN and infinities, which JSON has no signs for, are the words "NaN", "Infinity", "-Infinity"."""
    tree = {"title": title, "sections": [asdict(section) for section in sections]}
    return json.dumps(_strict(tree), indent=1, allow_nan=False) + "\n"


def shown(cell: Cell) -> str:
    """A cell as the page writes it: four digits, thousands apart, an absent figure as a dash."""
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
