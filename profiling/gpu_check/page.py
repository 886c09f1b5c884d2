"""The Markdown page of a GPU check: each step's question and outcome, and every figure that the benches measured.

page(summary, folder)        # `folder` holds the JSON that the benches wrote
bench_tables(record, folder)      # of one step
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from profiling.gpu_check.runner import Record
from profiling.gpu_check.runner import summary as step_summary

COLUMNS = ("variant", "median ms", "rounds", "spread", "times the reference", "peak MiB", "MFU", "warm-up s")
FIGURES = ("variant", "median_ms", "rounds", "spread", "speedup", "peak_mib", "mfu", "warm_up_s")  # of a bench's row


def page(summary: Mapping[str, Any], folder: Path) -> str:
    """The page, from summary.json and the files beside it."""
    gpu, records = summary["gpu"], summary["records"]
    title = f"# On {gpu.split(',')[0]}" if gpu else "# Dry run on a CPU: nothing here is a figure of a GPU"
    machine = f"{gpu}." if gpu else "Every step ran at a small size to show that it runs."
    machine += f" {', '.join(f'{name} {version}' for name, version in summary['packages'].items())}.\n"
    parts = [title, "", "    python -m profiling.gpu_check --out DIR", "", machine, _overview(records), ""]
    for record in records:
        parts += _section(record, folder / f"{record['step']}.json")
    return "\n".join(parts)


def _overview(records: list[Record]) -> str:
    rows = [f"| {record['step']} | {record['question']} | {step_summary(record)} |" for record in records]
    return "\n".join(("| step | asks | came to |", "|---|---|---|", *rows))


def _section(record: Record, figures: Path) -> Iterator[str]:
    shown = [*_test_outcomes(record), *_measured(figures)]
    if shown:
        yield from (f"## {record['step']}", "", *shown)


def bench_tables(record: Record, folder: Path) -> str:
    """The tables of one step's bench; "" if there is none."""
    return "\n".join(_measured(folder / f"{record['step']}.json"))


def _test_outcomes(record: Record) -> Iterator[str]:
    for kind in ("failed", "skipped"):
        if tests := record.get(f"{kind}_tests"):
            yield from (*(f"- {kind}: `{name}`: {why}" for name, why in tests.items()), "")
    if tests := record.get("passed_tests"):
        yield from (*(f"- passed: `{name}`, {seconds:.1f} s" for name, seconds in tests.items()), "")
    if record.get("running"):
        yield from (f"- running when it ended: `{record['running']}`", "")
    if record.get("last_lines"):
        yield from ("    " + line for line in record["last_lines"])
        yield ""


def _measured(path: Path) -> Iterator[str]:
    """A table for each measurement, with its notes."""
    if not path.is_file():
        return
    found = json.loads(path.read_text())
    if found:
        yield from (", ".join(f"{key} {value}" for key, value in found[0]["machine"].items()) + ".", "")
    for measurement in found:
        yield from (f"**{measurement.get('workload', measurement['name'])}**", "")
        yield from _table(measurement)
        yield from (*(f"- {note}" for note in measurement["notes"]), "")


def _table(measurement: dict[str, Any]) -> Iterator[str]:
    if "losses" in measurement:
        yield from _curves(measurement["losses"])
        return
    yield from ("| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1))
    for row in measurement["rows"]:
        formats = ("{}", "{:.2f}", "{}", "{:.0%}", "{:.2f}", "{:,.0f}", "{:.1%}", "{:.1f}")
        known = zip(formats, (row[key] for key in FIGURES), strict=True)
        yield "| " + " | ".join("" if value is None else form.format(value) for form, value in known) + " |"
    yield ""


def _curves(losses: dict[str, list[float]]) -> Iterator[str]:
    """Losses of about every tenth step."""
    steps = len(next(iter(losses.values())))
    yield from ("| step | " + " | ".join(losses) + " |", "|---:|" + "---:|" * len(losses))
    for step in sorted({0, steps - 1, *range(0, steps, max(1, steps // 10))}):
        yield f"| {step} | " + " | ".join(f"{curve[step]:.4f}" for curve in losses.values()) + " |"
    yield ""
