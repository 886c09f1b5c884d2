"""python -m evaluation.summary RUN [RUN ...]: summarise the log and evaluation of runs on one screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs import UserError
from profiling.report.run_record import read_run

LOSSES = ("clip", "ssl", "rec")


def summarise(run: Path) -> dict[str, str]:
    """Return the lines of the summary: title -> text. Raises UserError for a directory that is no finished run."""
    log, results = read_run(run), _read_results(run)
    lines = {"run": str(run), "steps": str(log.steps[-1])}
    for name in LOSSES:
        if f"loss/{name}" in log.keys:
            lines[f"loss {name}"] = f"{log.first(f'loss/{name}'):.3f} -> {log.last(f'loss/{name}'):.3f}"
    if shot := results.get("zero_shot"):
        lines["zero-shot, held out"] = (
            f"{shot['top1']:.1%} of {shot['images']} images, {shot['times_chance']:.1f} x chance "
            f"({shot['chance']:.1%}, {shot['classes']} classes)"
        )
    if rec := results.get("reconstruction"):
        lines["PSNR, held out"] = f"{rec['psnr_db']:.2f} dB (mean colour alone: {rec['psnr_db_of_mean_colour']:.2f} dB)"
    if results.get("steps") not in (None, log.steps[-1]):
        lines["evaluated"] = (
            f"the weights of step {results['steps']}, not the last ones: run `python -m evaluation.run {run}` again"
        )
    lines["speed"] = f"{log.median('speed/samples_per_second'):.1f} samples/s (median over reports)"
    lines["pictures"] = str(run / "pictures")
    lines["TensorBoard"] = f"tensorboard --logdir {run / 'tensorboard'}"
    return lines


def _read_results(run: Path) -> dict[str, Any]:
    path = run / "evaluation.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; run `python -m evaluation.run {run}` first")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
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
