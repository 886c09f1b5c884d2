"""Plots of the evaluation as PNG files; the evaluation's only use of matplotlib.

lr_sweep([{"features": "latent", "lr": 0.1, "top1": 0.62}, ...], chance=0.02, path=Path("lr_sweep.png"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
Points = Sequence[tuple[float, float]]
_MAX_AXIS_NAMES = 64  # class names that fit on an axis
_MAX_PRINTED_FRACTIONS = 12  # classes up to which fractions are printed in the cells


def draw_lr_sweep(rows: Sequence[dict], chance: float, path: Path) -> None:
    """Plot held-out accuracy over learning rate, one line for each kind of feature; `rows` of the linear probe."""
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(5.0, 3.2)
        axes = figure.add_subplot()
        for name in dict.fromkeys(row["features"] for row in rows):
            points = sorted((row["lr"], row["top1"]) for row in rows if row["features"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.axhline(chance, color="0.6", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out top-1", ylim=(0, None))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        _add_legend(figure)
        figure.savefig(path, dpi=150)


def draw_confusion_matrix(counts_KK: Tensor, names: Sequence[str], path: Path) -> None:
    """Plot how often each class (row) is predicted as each class (column), as fractions of the row.

    A class without images is blank.
    """
    counts = counts_KK.double().cpu()
    fractions = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).numpy()
    side = max(4.0, 2.5 + 0.17 * len(names))
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(side + 0.8, side)
        axes = figure.add_subplot()
        # Most fractions are small: the square root spreads them over the colours.
        drawn = axes.imshow(fractions, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="Blues", interpolation="nearest")
        if len(names) <= _MAX_AXIS_NAMES:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(names) <= _MAX_PRINTED_FRACTIONS:
            for row, column in zip(*fractions.nonzero(), strict=True):
                fraction = fractions[row, column]
                ink = "white" if fraction > 0.3 else "black"
                axes.text(column, row, f"{fraction:.0%}", ha="center", va="center", fontsize=7, color=ink)
        bar = figure.colorbar(drawn, shrink=0.6, ticks=(0, 0.05, 0.2, 0.5, 1), format="{x:.0%}")
        bar.outline.set_visible(False)
        axes.set(xlabel="predicted", ylabel="true", title="Fraction of each class's images")
        figure.savefig(path, dpi=150)


def draw_sample_grid(panels: Mapping[str, Tensor], names: Sequence[str], path: Path) -> None:
    """Plot panels of samples side by side: (rows, columns, H, W, 3) uint8 by title; `names` are those of the rows."""
    rows, columns, height, width, _ = next(iter(panels.values())).shape
    gap = max(1, width // 32)
    for_names = 0.4 + 0.08 * max(map(len, names))  # inches; constrained layout would cut long names off
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(for_names + len(panels) * columns * 0.75, 0.4 + rows * 0.75)
        for axes, (title, images) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            mosaic = images.new_full((rows, height + gap, columns, width + gap, 3), 255)
            mosaic[:, :height, :, :width] = images.permute(0, 2, 1, 3, 4)
            axes.imshow(mosaic.flatten(2, 3).flatten(0, 1)[:-gap, :-gap].numpy(), interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        figure.axes[0].set_yticks([row * (height + gap) + height / 2 for row in range(rows)], names)
        figure.axes[0].tick_params(length=0)
        figure.savefig(path, dpi=150)


def draw_curves(
    lines: Mapping[str, Points], xlabel: str, ylabel: str, path: Path, log_across: bool = True, log_up: bool = False
) -> None:
    """Plot one line for each name through its points, in their order; `log_across` and `log_up` set the axes."""
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(5.4, 3.4)
        axes = figure.add_subplot()
        for number, (name, points) in enumerate(lines.items()):  # a name keeps its colour where others have no points
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=f"C{number}")
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_across else "linear")
        if log_across:  # ticks where the points are, to two digits
            ticks = sorted({f"{x:.1e}" for points in lines.values() for x, _ in points}, key=float)
            axes.set_xticks([float(tick) for tick in ticks], ticks)
            axes.minorticks_off()
        if axes.lines:
            _add_legend(figure)
        if axes.lines and log_up:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        figure.savefig(path, dpi=150)


def _add_legend(figure: Figure) -> None:
    """Put the legend below the axes: finding the emptiest corner inside can take matplotlib long, and then it warns."""
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
