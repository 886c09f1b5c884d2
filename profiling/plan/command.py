"""What a run would need of a cluster, before anyone rents it: memory, time, cost of every way to lay it out.

    python -m profiling.plan --config configs/vtp_7b.yaml --gpu h100 --gpus 256 [--samples 1.1e9] [--link nvlink,ib400]
        [--ds_config-out FILE] [--json FILE] [--all] [key=value ...]

Builds the model on the meta device, so that no preset is too large for any machine, and ranks ZeRO stages,
micro-batches of the gradient cache, activation checkpointing and FP8 by speed; what does not fit is refused with what
it would need. `--gpu this` takes this machine's own measured rates, for `--gpus` ranks on it.

The model of time: profiling/plan/step_time.py, and what it assumes of GPUs: profiling/plan/rates.py. Memory and bytes
sent are predicted by profiling/step/peak.py and profiling/step/communication.py, which are held against real runs;
docs/planner.md shows every prediction that could be checked beside what was measured or published.
"""

from __future__ import annotations

import math
import os
import sys

from configs import UserError
from configs.command_line import CommandParser, output_file
from profiling.plan.rates import DEFAULT_LINKS, GPUS, THIS


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code: 0, 1 where nothing fits, 2 for a mistake."""
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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says here that it has found no GPU; nothing runs
    from profiling.plan.page import run

    try:
        return run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
