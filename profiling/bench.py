"""python -m profiling.bench NAME [--rounds N] [--json FILE]: the engine's parts against what one would write otherwise.

Variants alternate in one process; a table gives medians, paired ratios, peak memory and MFU against this machine's own
matmul peak. Every bench first checks that its variants compute the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from configs import UserError
from configs.command_line import CommandParser, output_file

BENCHES = (
    "train",
    "step",
    "packed",
    "attention",
    "text",
    "compile",
    "block_kernels",
    "depth",
    "masked",
    "prototypes",
    "contrastive",
    "grad_cache",
    "loader",
    "fp8",
    "fp8_blocks",
    "fp8_losses",
    "step_memory",
    "plan",
)


class Shown(Protocol):
    """What a bench gives: a Measurement, or a table of its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences, printed below the table."""
        ...

    def as_table(self) -> Table:
        """What is printed."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """What --json writes."""
        ...


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = CommandParser(prog="python -m profiling.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=11, help="times each variant runs (default 11)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=output_file, default=None, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: a median needs at least one round")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run: Callable[[int], list[Shown]] = import_module(f"profiling.benches.{options.name}").run
    try:
        measurements = run(options.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    for measurement in measurements:
        console.print(measurement.as_table())
        for note in measurement.notes:
            console.print(note)
    if options.json is not None:
        options.json.write_text(json.dumps([m.as_dict() for m in measurements], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
