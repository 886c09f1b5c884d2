"""The evaluation's drawings as PNG files: matplotlib's door on this side.

lr_sweep([{"features": "latent", "lr": 0.1, "top1": 0.62}, ...], chance=0.02, path=Path("lr_sweep.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_MOST_NAMES = 64  # on an axis, before they run into each other


def lr_sweep(rows: Sequence[dict], chance: float, path: Path) -> None:
    """Held-out accuracy over the learning rate, one line for each kind of feature; `rows` as a probe gives them."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(5.0, 3.2)
        axes = figure.add_subplot()
        for name in dict.fromkeys(row["features"] for row in rows):
            points = sorted((row["lr"], row["top1"]) for row in rows if row["features"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.axhline(chance, color="0.6", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out top-1", ylim=(0, None))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def confusion_matrix(counts_KK: Tensor, names: Sequence[str], path: Path) -> None:
    """Which class (row) is taken for which (column), as shares of the row; a class without images is blank."""
    counts = counts_KK.double().cpu()
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).numpy()
    side = max(3.0, 1.5 + 0.11 * len(names))
    with matplotlib.rc_context(_STYLE | {"font.size": 6}):
        figure = _figure(side, side)
        axes = figure.add_subplot()
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        if len(names) <= _MOST_NAMES:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="taken for", ylabel="is")
        figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
