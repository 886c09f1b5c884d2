"""The soak as two pictures: how far the run had come, and what its processes held.

draw(disturbed, undisturbed, story, lives, out)         # out/progress.png, out/memory.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.soak.gauges import Life
from tests.soak.run import Run
from tests.soak.schedule import FAULTS
from tests.soak.story import Story

SIZE = (7.5, 3.6)  # inches
COLOURS = dict(zip(FAULTS, ("C3", "C1", "k", "C2", "C4", "C5", "C7", "C8"), strict=True))


def draw(disturbed: Run, undisturbed: Run, story: Story, lives: Sequence[Life], out: Path) -> None:
    """Writes both."""
    _progress(disturbed, undisturbed, story, out / "progress.png")
    _memory(lives, out / "memory.png")


def _progress(disturbed: Run, undisturbed: Run, story: Story, path: Path) -> None:
    figure, axes = _axes("minutes", "step")
    for run, colour, label in ((disturbed, "C0", "disturbed"), (undisturbed, "0.6", "undisturbed")):
        reports = run.reports()
        begin = story.began if run is disturbed else reports[0]["time"]
        minutes = [(report["time"] - begin) / 60 for report in reports]
        axes.plot(minutes, [report["step"] for report in reports], color=colour, label=label, linewidth=1)
    for kind in dict.fromkeys(event.kind for event in story.events):
        own = [event for event in story.events if event.kind == kind]
        axes.plot(
            [event.minutes for event in own], [event.step for event in own], "o", color=COLOURS[kind], label=kind,
            markersize=4,
        )  # fmt: skip
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _memory(lives: Sequence[Life], path: Path) -> None:
    figure, axes = _axes("minutes", "resident memory (MiB)")
    roles = sorted({life.role for life in lives} - {"other"})
    for number, role in enumerate(roles):
        for life in (life for life in lives if life.role == role):
            minutes = [reading.seconds / 60 for reading in life.readings]
            sizes = [reading.rss_mib for reading in life.readings]
            axes.plot(minutes, sizes, color=f"C{number}", linewidth=1, label=role)
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend(list(first.values()), list(first), loc="center right", frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)


def _axes(across: str, up: str):  # type: ignore[no-untyped-def]
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return figure, axes
