"""What an evaluation leaves behind: evaluation.json, pictures, a table on the screen.

    {"zero_shot": {"top1": 0.114, ...}, "linear_probe": {...}, "rows": [{"task": "linear_probe", ...}],
     "source": "runs/demo", "weights": "9f86d0...", "steps": 400, "latents": "60303a...",
     "held_out": ["demo_data/held_out-*.tar"], "crop": 64, "bad_samples": {}}

One object of plain figures for each task; `rows` holds what is longer than a figure, such as a whole sweep.
`weights` is the sha256 of all tensors that were measured, `steps` the number of training steps (null where the
file does not record it), `latents` the sha256 of those that the latents come from: a latent store and a generator on it
name their tokenizer by the latter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import UserError
from configs.load import one_line
from data.durable_files import write_atomic
from engine.complaint import complain
from evaluation.outcome import Figure, Outcome


def as_json(outcomes: Mapping[str, Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json; `about` is what belongs to no task.

    Raises UserError for a figure that is no number: JSON has no word for it, and nobody could compare it.
    """
    for task, outcome in outcomes.items():
        check_numbers(outcome.figures, task)
    rows: list[dict[str, Figure]] = [
        {"task": task, **row} for task, outcome in outcomes.items() for row in outcome.rows
    ]
    return {task: dict(outcome.figures) for task, outcome in outcomes.items()} | {"rows": rows} | dict(about)


def check_numbers(figures: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a figure that is infinite or none; `where` is what it is of."""
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where}: {name} is {value}: the weights are finite, but so large that what is computed with them is "
                "not; go back to an earlier checkpoint"
            )


def write(folder: Path, found: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Write evaluation.json, of `found`, then pictures/*.png into `folder`. Raises as `write_figures` does."""
    write_figures(folder / "evaluation.json", found)
    for outcome in outcomes.values():
        for name, draw in outcome.pictures.items():
            draw_picture(folder / "pictures" / f"{name}.png", draw)


def write_figures(path: Path, found: Mapping[str, Any]) -> None:
    """Write `found` as JSON, whole or not at all. Raises UserError, with the figures in its message, on failure."""
    try:
        write_atomic(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free disk space and evaluate again; the figures "
            f"are {json.dumps(found)}"
        ) from None


def draw_picture(path: Path, draw: Callable[[Path], None]) -> None:
    """Draw a picture to `path`; a failure is a line on stderr, not an error, since the figures are written already."""
    try:
        path.parent.mkdir(exist_ok=True)
        draw(path)
    except Exception as error:
        complain(f"could not draw {path}: {type(error).__name__}: {one_line(error)}")


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints every task's figures, one line each."""
    table = Table("task", "figure", "value", title="what the tokenizer is worth")
    for task, figures in found.items():
        if isinstance(figures, dict) and task != "bad_samples":
            for idx, (name, value) in enumerate(figures.items()):
                table.add_row("" if idx else task, escape(name), escape(words(value)))
            table.add_section()
    for reason, count in found["bad_samples"].items():
        table.add_row("bad samples", reason, str(count))
    (console or Console()).print(table)


def words(value: Figure) -> str:
    """A figure with four digits; counts and sentences as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
