"""python -m evaluation.summary RUN [RUN ...]: what a run reached, from its log and its evaluation, on one screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs import UserError

LOSSES = ("clip", "ssl", "rec")


def summarise(run: Path) -> dict[str, str]:
    """The lines of the summary, as words. Raises UserError for a directory that is no finished run."""
    reports, results = _reports(run), _results(run)
    first, last = reports[0], reports[-1]
    lines = {"run": str(run), "steps": str(last["step"])}
    for name in LOSSES:
        if f"loss/{name}" in last:
            lines[f"loss {name}"] = f"{first[f'loss/{name}']:.3f} -> {last[f'loss/{name}']:.3f}"
    if shot := results.get("zero_shot"):
        lines["zero-shot, held out"] = (
            f"{shot['top1']:.1%} of {shot['images']} images, {shot['times_chance']:.1f} x chance "
            f"({shot['chance']:.1%}, {shot['classes']} classes)"
        )
    if rec := results.get("reconstruction"):
        lines["PSNR, held out"] = f"{rec['psnr_db']:.2f} dB (mean colour alone: {rec['psnr_db_of_mean_colour']:.2f} dB)"
    speeds = sorted(report["speed/samples_per_second"] for report in reports)
    lines["speed"] = f"{speeds[len(speeds) // 2]:.1f} samples/s (median over reports)"
    lines["pictures"] = str(run / "pictures")
    lines["TensorBoard"] = f"tensorboard --logdir {run / 'tensorboard'}"
    return lines


def _reports(run: Path) -> list[dict[str, Any]]:
    try:
        reports = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except OSError:
        raise UserError(f"{run} has no log.jsonl: it is not a run directory; train first") from None
    if not reports:
        raise UserError(f"{run}/log.jsonl is empty: the run has not reported yet")
    return reports


def _results(run: Path) -> dict[str, Any]:
    path = run / "evaluation.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; run `python -m evaluation.run {run}` first")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    table = Table(show_header=False, title="what the run reached")
    try:
        summaries = [summarise(Path(run)) for run in arguments]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        table.add_row(name, *(summary.get(name, "") for summary in summaries))
    Console(width=100 if len(summaries) == 1 else None).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
