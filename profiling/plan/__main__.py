"""Plan a run on a cluster before renting it: memory, time and cost of every way to distribute it.

    python -m profiling.plan --config configs/vtp_7b.yaml --gpu h100 --gpus 256 [--samples 1.1e9] [--link nvlink,ib400]
        [--ds_config-out FILE] [--json FILE] [--all] [key=value ...]

Builds the model on the meta device, so that no preset is too large for any machine, and ranks ZeRO stages,
micro-batches of the gradient cache, activation checkpointing and FP8 by speed; what does not fit is refused with the
memory it would need. `--gpu this` uses this machine's own measured rates, for `--gpus` ranks on it.

The time model is profiling/plan/step_time.py, what it assumes of GPUs profiling/plan/rates.py. Memory and bytes sent
are predicted by profiling/cost/peak_memory.py and profiling/cost/communication.py, which tests compare with real runs;
docs/planner.md lists every prediction that could be checked beside what was measured or published.
"""

from __future__ import annotations

import math
import os
import sys

from configs import UserError
from configs.command_line import CommandParser, output_file
from profiling.plan.rates import DEFAULT_LINKS, GPUS, THIS


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code: 0, 1 where nothing fits, 2 for a mistake."""
    parser = CommandParser(prog="python -m profiling.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)}; or {THIS}, this machine, measured")
    parser.add_argument("--gpus", type=int, required=True, help="how many, over all nodes")
    parser.add_argument("--samples", type=float, help="of the whole run (default: optim.steps x batch.clip)")
    parser.add_argument("--link", default=DEFAULT_LINKS, help=f"inside and between nodes (default {DEFAULT_LINKS})")
    parser.add_argument(
        "--ds_config-out", type=output_file, metavar="FILE", help="write the DeepSpeed JSON of the best here"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write every plan here")
    parser.add_argument("--all", action="store_true", help="try everything, also what only costs; show all that fits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.gpus < 1:
        parser.error(f"--gpus {parsed.gpus}: a plan needs a GPU; give at least 1")
    if parsed.samples is not None and not 1 <= parsed.samples < math.inf:
        parser.error(f"--samples {parsed.samples:g}: the run's samples are a finite number; give at least 1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it has found no GPU; nothing runs
    from profiling.plan.table import run

    try:
        return run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
