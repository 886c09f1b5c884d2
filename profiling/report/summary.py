"""The head of a report: what ran, what it took, what it reached, how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise

from profiling.report.blocks import Block, Cell, Sentence
from profiling.report.data import Run, number
from profiling.report.figures import labels, side_by_side


def summary(runs: list[Run]) -> list[Block]:
    """Tables with a column a run, and sentences on resumes and stops, what is missing and what could not be read."""
    blocks: list[Block] = []
    for caption, facts_of in (
        ("What ran", _facts),
        ("What it took and reached", _figures_of),
        ("Evaluation", _results),
    ):
        facts = [facts_of(run) for run in runs]
        names = dict.fromkeys(name for fact in facts for name in fact)
        if names:
            blocks.append(side_by_side(caption, runs, {name: [fact.get(name) for fact in facts] for name in names}))
    for run, label in zip(runs, labels(runs), strict=True):
        if run.evaluation is None:
            blocks.append(Sentence(f"{label} is not evaluated: python -m evaluation.run {run.directory}"))
        elif run.evaluation.get("steps") not in (None, run.steps[-1]):
            blocks.append(Sentence(f"{label} was evaluated with the weights of step {run.evaluation['steps']}."))
        blocks += [
            Sentence(
                f"{label} was resumed: after step {last:,} its log goes on with step {after:,}; the later figures hold."
            )
            for last, after in run.steps_back
        ]
        blocks += [Sentence(f"{label} was asked to stop at step {step:,}, saved and left.") for step in run.stops]
        blocks += [Sentence(f"{label}: {note}") for note in run.notes]
    return blocks


def _facts(run: Run) -> dict[str, Cell]:
    return {
        "directory": str(run.directory),
        "preset": run.config.name if run.config else None,
        "first report": _clock(run.times, min),
        "last report": _clock(run.times, max),
        "end": _end(run),
    }


def _figures_of(run: Run) -> dict[str, Cell]:
    last_step = run.steps[-1]
    return {
        "steps": last_step,
        "samples": last_step * run.config.samples_per_step if run.config else None,
        "minutes in steps": _minutes(run),
        "samples/s (median)": run.median("speed/samples_per_second"),
        "ms a step (median)": run.median("speed/step_ms"),
        "peak memory of the first rank, GiB": run.peak_gib,
        "peak memory of the rank with the most, GiB": run.last("memory/peak_max_gib"),
        **{f"loss {name} (last)": run.last(f"loss/{name}") for name in ("total", "clip", "ssl", "rec")},
    }


def _results(run: Run) -> dict[str, Cell]:
    """Every figure of evaluation.json, by task."""
    tasks = {task: results for task, results in (run.evaluation or {}).items() if isinstance(results, dict)}
    return {
        f"{task} {name}": value if isinstance(value, str) else number(value)
        for task, results in tasks.items()
        for name, value in results.items()
    }


def _end(run: Run) -> str:
    last_step = run.steps[-1]
    if run.config is None:
        return f"at step {last_step:,}; without config.yaml nobody knows of how many"
    if last_step >= run.config.optim.steps:
        return "finished"
    if last_step in run.stops:
        return f"stopped when asked to, at step {last_step:,} of {run.config.optim.steps:,}"
    return f"the log ends at step {last_step:,} of {run.config.optim.steps:,}: still running, killed or failed"


def _minutes(run: Run) -> float | None:
    """Time spent in steps, whatever lay between a stop and a resume."""
    durations = [
        (step - before) * step_ms / 60_000
        for (before, step), step_ms in zip(pairwise([0, *run.steps]), run.series("speed/step_ms"), strict=True)
        if step_ms is not None and math.isfinite(step_ms)
    ]
    return sum(durations) if durations else None


def _clock(times: list[float], which: Callable[[list[float]], float]) -> str | None:
    known = [moment for moment in times if 0 <= moment < 2**36]
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(which(known))) if known else None
