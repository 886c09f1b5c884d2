"""Results of the evaluation tasks: in memory, in evaluation.json, on the screen.

    TaskResult({"latent_top1": 0.81}, [{"features": "latent", "lr": 0.1, "top1": 0.81}], {"lr_sweep": draw})

evaluation.json has one object of metrics for each task; `rows` holds what is longer than a metric, such as a sweep:

    {"zero_shot": {"top1": 0.114, ...}, "linear_probe": {...}, "rows": [{"task": "linear_probe", ...}],
     "source": "runs/demo", "weights": "9f86d0...", "steps": 400, "latents": "60303a...",
     "held_out": ["demo_data/held_out-*.tar"], "crop": 64, "bad_samples": {}}

`weights` is the sha256 of all tensors that were evaluated, `steps` the number of training steps (null if the file does
not record it), `latents` the sha256 of the tensors that latents come from: a latent store, and a generator trained on
it, identify their tokenizer by the latter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import UserError
from configs.load import one_line
from data.durable_files import write_atomic
from engine.stderr import print_error
from evaluation.tokenizer_source import TokenizerOutputs

MetricValue = float | int | str


@dataclass(frozen=True)
class TaskResult:
    """Metrics of one task, rows of further detail, and plots."""

    metrics: Mapping[str, MetricValue]  # a string is the reason why a metric was not computed
    rows: list[dict[str, MetricValue]] = field(default_factory=list)
    plots: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)  # name -> writes the PNG to a path


class Task(Protocol):
    """One evaluation of a tokenizer. All tasks of a run share one pass over the held-out images."""

    def add(self, batch: TokenizerOutputs) -> None:
        """Process a batch. Not a collective: ranks may have different numbers of batches."""
        ...

    def result(self) -> TaskResult:
        """Return the result over all ranks. Called once after the last batch, on every rank in the same order."""
        ...


def to_json(results: Mapping[str, TaskResult], about: Mapping[str, Any]) -> dict[str, Any]:
    """Build the content of evaluation.json; `about` holds what belongs to no task.

    Raises UserError for a metric that is not finite: JSON cannot hold it, and nobody could compare it.
    """
    for task, result in results.items():
        check_finite_metrics(result.metrics, task)
    rows: list[dict[str, MetricValue]] = [
        {"task": task, **row} for task, result in results.items() for row in result.rows
    ]
    return {task: dict(result.metrics) for task, result in results.items()} | {"rows": rows} | dict(about)


def check_finite_metrics(metrics: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a metric that is infinite or NaN; `where` names the task in the message."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where}: {name} is {value}: the weights are finite, but so large that what is computed with them is "
                "not; go back to an earlier checkpoint"
            )


def write_results(folder: Path, content: Mapping[str, Any], results: Mapping[str, TaskResult]) -> None:
    """Write evaluation.json with `content`, then pictures/*.png, into `folder`. Raises as `write_json` does."""
    write_json(folder / "evaluation.json", content)
    for result in results.values():
        for name, draw in result.plots.items():
            write_plot(folder / "pictures" / f"{name}.png", draw)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON, atomically. Raises UserError, with the results in its message, on failure."""
    try:
        write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free disk space and evaluate again; the figures "
            f"are {json.dumps(content)}"
        ) from None


def write_plot(path: Path, draw: Callable[[Path], None]) -> None:
    """Write a plot to `path`; a failure is a line on stderr, not an error, since the metrics are written already."""
    try:
        path.parent.mkdir(exist_ok=True)
        draw(path)
    except Exception as error:
        print_error(f"could not draw {path}: {type(error).__name__}: {one_line(error)}")


def show_results(content: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table with one line for each metric."""
    table = Table("task", "metric", "value", title="evaluation of the tokenizer")
    for task, metrics in content.items():
        if isinstance(metrics, dict) and task != "bad_samples":
            for idx, (name, value) in enumerate(metrics.items()):
                table.add_row("" if idx else task, escape(name), escape(format_value(value)))
            table.add_section()
    for reason, count in content["bad_samples"].items():
        table.add_row("bad samples", reason, str(count))
    (console or Console()).print(table)


def format_value(value: MetricValue) -> str:
    """Format a float with four digits; counts and strings as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
