"""Draw plots as SVG text for a page; the one door to matplotlib. The same figures give the same bytes.

    svg = line_plot(Plot("loss/clip", [Line("demo", [10, 20], [4.5, 3.9])]))     # '<svg viewBox=...'

The page writes titles and names of runs: none of the run's words get into the SVG. Text and axes are drawn in two
placeholder colours for the page's own, so that a plot is readable on light and on dark.
"""

from __future__ import annotations

import io
import math
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from profiling.report.blocks import LinePlot, RooflinePlot, StackedBars

COLOURS = (
    "#2f7ebc", "#d9762b", "#3d9a5f", "#a565b8", "#c2485a", "#8a7a2e", "#4aa3a8", "#8c6d5a", "#7a86c2", "#9aa0a6",
    "#b8862f", "#5b8f3a", "#d07aa0", "#5f6f86", "#3c6e71", "#b0543c",
)  # fmt: skip
MAX_DRAWN = 1e30  # beyond, axes cannot be divided any more
_INK, _RULE = "#010203", "#010204"  # become currentColor and the page's rule
_REMOVED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<style.*?</style>",
        r'(?<=<g) id="[^"]*"',
        r' (?:width|height)="[\d.]+pt"',
        r" font-family: [^;]*;",
    )
)
_MARKERS = {"●": "o", "■": "s", "▲": "^", "◆": "D", "▼": "v", "✚": "P", "★": "*", "✖": "X"}  # legend -> plot
_MAX_DOTS = 12  # up to so many points get a dot each; beyond, only isolated ones
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.formatter.use_mathtext": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def line_plot(plot: LinePlot) -> str:
    """Draw lines over steps."""
    with matplotlib.rc_context(_style(plot.title)):
        figure, axes = _canvas(height=2.4)
        for line, colour, dashes in zip(plot.lines, COLOURS, ("-", (0, (4, 1.5))), strict=False):
            drawn = _drawable(line.values)
            dots = list(range(len(drawn))) if len(drawn) <= _MAX_DOTS else _isolated(drawn)
            axes.plot(
                line.steps,
                drawn,
                color=colour,
                linewidth=1.6,
                linestyle=dashes,
                marker="o",
                markersize=3,
                markevery=dots,
            )
        if plot.is_from_zero and axes.get_ylim()[0] > 0:
            axes.set_ylim(0, axes.get_ylim()[1] * 1.04)  # its margin is of the spread, which may be small
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return _svg(figure)


def stacked_bars(stack: StackedBars) -> str:
    """Draw one horizontal bar for each run; its parts in the order and colours of the legend."""
    with matplotlib.rc_context(_style(stack.title)):
        figure, axes = _canvas(height=0.75 + 0.45 * len(stack.labels), width=6.4)
        left = [0.0] * len(stack.labels)
        for part_idx, widths in enumerate(stack.parts.values()):
            axes.barh(range(len(widths)), widths, left=left, height=0.6, color=part_colour(part_idx))
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.set_xlabel(stack.unit)
        return _svg(figure)


def roofline_plot(roofline: RooflinePlot) -> str:
    """Draw the roof over FLOPs a byte, both axes logarithmic, and a point for each part, as in the legend."""
    ridge = roofline.flops_per_second / roofline.bytes_per_second
    found = [each for each, _ in roofline.points.values()]
    low, high = min([ridge / 8, *found]) / 1.5, max([ridge * 8, *found]) * 1.5
    with matplotlib.rc_context(_style(roofline.title)):
        figure, axes = _canvas(height=3.6, width=6.4)
        roof = [min(roofline.flops_per_second, each * roofline.bytes_per_second) / 1e9 for each in (low, ridge, high)]
        axes.plot((low, ridge, high), roof, color=_INK, linewidth=1.4)
        for idx, (intensity, speed) in enumerate(roofline.points.values()):
            axes.plot(intensity, speed / 1e9, marker=_MARKERS[part_marker(idx)], color=part_colour(idx), markersize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(axis="both")
        axes.set_xlabel("FLOPs a byte")
        axes.set_ylabel("GFLOP/s")
        return _svg(figure)


def part_colour(part_idx: int) -> str:
    """The colour of a bar's part."""
    return COLOURS[part_idx % len(COLOURS)]


def part_marker(part_idx: int) -> str:
    """The legend's marker of a roofline's point: not everybody can distinguish points by colour."""
    return list(_MARKERS)[part_idx % len(_MARKERS)]


def _style(title: str) -> dict[str, object]:
    """Ids must differ between plots of a page and never change: they come from the title."""
    return _STYLE | {"svg.hashsalt": "plot " + title.encode(errors="replace").decode()}


def _drawable(values: list[float | None]) -> list[float]:
    """Replace what does not fit an axis with NaN, which is drawn as a gap."""
    return [math.nan if value is None or not abs(value) < MAX_DRAWN else value for value in values]


def _isolated(values: list[float]) -> list[int]:
    """Return the indices of values between two gaps: no line leads to them, so they need a dot."""
    around = [math.nan, *values, math.nan]
    return [
        idx
        for idx, value in enumerate(values)
        if not math.isnan(value) and math.isnan(around[idx]) and math.isnan(around[idx + 2])
    ]


def _canvas(height: float, width: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot(facecolor="none")


def _svg(figure: Figure) -> str:
    """SVG without what only a file of its own needs: XML header, size, fonts, styles, names of groups."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :].strip()
    for removed in _REMOVED:
        svg = removed.sub("", svg)
    return svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
