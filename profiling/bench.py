"""python -m profiling.bench NAME [--rounds N | --dry] [--json FILE]: time the engine against plain alternatives.

Variants alternate in one process; a table shows medians, paired ratios, peak memory and MFU against this machine's own
matmul peak. Every bench first checks that its variants compute the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from configs import UserError
from configs.command_line import CommandParser, output_file
from profiling.benches.recorder import BenchRecorder

BENCHES = {  # name: file in profiling/benches
    "train": "train",
    "train_smaller": "train",
    "overlap": "train",
    "step": "step",
    "packed": "step",
    "attention": "blocks",
    "text": "blocks",
    "compile": "blocks",
    "block_kernels": "block_kernels",
    "depth": "blocks",
    "masked": "blocks",
    "prototypes": "losses",
    "contrastive": "losses",
    "grad_cache": "train",
    "loader": "loader",
    "fp8": "fp8",
    "fp8_blocks": "fp8",
    "fp8_blocks_wide": "fp8",
    "fp8_losses": "fp8",
    "step_memory": "predictions",
    "plan": "predictions",
}


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = CommandParser(prog="python -m profiling.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=int, default=11, help="times each variant runs (default 11)")
    length.add_argument("--dry", action="store_true", help="one round at the smallest size, to check that a bench runs")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--json", type=output_file, default=None, metavar="FILE", help="also write the figures here, as they come"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: a median needs at least one round")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.dry:  # traced and differentiated, but no code is generated, which takes minutes
        torch.compile = partial(torch.compile, backend="aot_eager")
    module = import_module(f"profiling.benches.{BENCHES[options.name]}")
    run: Callable[[BenchRecorder], None] = getattr(module, f"bench_{options.name}")
    try:
        run(BenchRecorder(1 if options.dry else options.rounds, options.json, is_dry=options.dry))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
