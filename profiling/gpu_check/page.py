"""The page of a GPU check: what was asked, what came of it, every figure with the command that made it.

page(summary, folder)        # Markdown; `folder` holds the JSON that the benches wrote
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from profiling.gpu_check.carry_out import Record, outcome

COLUMNS = ("variant", "median ms", "spread", "times the reference", "peak MiB", "MFU")


def page(summary: Mapping[str, Any], folder: Path) -> str:
    """Written from summary.json and from what lies beside it."""
    gpu, records = summary["gpu"], summary["records"]
    title = f"# On {gpu.split(',')[0]}" if gpu else "# Dry run on a CPU: nothing here is a figure of a GPU"
    machine = f"{gpu}.\n" if gpu else "Every step ran at a small size to show that it runs.\n"
    parts = [title, "", "    python -m profiling.gpu_check --out DIR", "", machine, _overview(records), ""]
    for record in records:
        parts += _section(record, folder / f"{record['step']}.json")
    return "\n".join(parts)


def _overview(records: list[Record]) -> str:
    rows = [f"| {record['step']} | {record['question']} | {outcome(record)} |" for record in records]
    return "\n".join(("| step | asks | came to |", "|---|---|---|", *rows))


def _section(record: Record, figures: Path) -> Iterator[str]:
    shown = [*_trouble(record), *_measured(figures)]
    if shown:
        yield from (f"## {record['step']}", "", *shown)


def _trouble(record: Record) -> Iterator[str]:
    if record.get("failed_tests"):
        yield from (*(f"- failed: `{name}`" for name in record["failed_tests"]), "")
    if record.get("skipped_tests"):
        yield from (*(f"- skipped: `{name}`: {why}" for name, why in record["skipped_tests"].items()), "")
    if record.get("last_lines"):
        yield from ("    " + line for line in record["last_lines"])
        yield ""


def _measured(path: Path) -> Iterator[str]:
    """A table for each measurement, its notes below."""
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
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = (row["variant"], f"{row['median_ms']:.2f}", f"{row['spread']:.0%}", f"{row['speedup']:.2f}", peak, mfu)
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _curves(losses: dict[str, list[float]]) -> Iterator[str]:
    """Every tenth or so of the steps."""
    steps = len(next(iter(losses.values())))
    yield from ("| step | " + " | ".join(losses) + " |", "|---:|" + "---:|" * len(losses))
    for step in sorted({0, steps - 1, *range(0, steps, max(1, steps // 10))}):
        yield f"| {step} | " + " | ".join(f"{curve[step]:.4f}" for curve in losses.values()) + " |"
    yield ""
