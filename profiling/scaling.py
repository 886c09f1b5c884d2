"""Print the tables of docs/scaling.md: the planner's fastest layout from 8 to 4,096 GPUs, for three presets.

    python -m profiling.scaling [--gpu h100] [--link nvlink,ib400]

weak      every GPU keeps its rows, the global batch grows with the GPUs
strong    the preset's global batch is divided over more and more GPUs, as long as each has a row of every objective

"Breaks first" is the first of the planner's assumptions that no longer holds there, in the order of
`broken_assumptions`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import configs
from configs import Config, UserError, load_config
from configs.command_line import CommandParser
from profiling.plan.rates import DEFAULT_LINKS, GPUS

if TYPE_CHECKING:
    from profiling.plan.search import LayoutPlan

# Preset, and the GPUs of its header: their rows a GPU are what weak scaling keeps.
PRESETS = {"vtp_l": 128, "vtp_1b": 512, "vtp_7b": 1024}
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WITHOUT_FILES = "objectives.rec.lpips_weights=none"  # planning reads no weights
LOADER = 2_000  # images a second that one rank's Python makes (docs/decisions/order_and_data.md)
LARGEST_BATCH = 32_768  # of image-text pairs that a published VTP run has shown to learn [A]
LIMIT = 0.1  # fraction of the step, from which a cost is called a limit


def config_at(preset: str, gpus: int, is_weak: bool) -> Config | None:
    """The preset's config on so many GPUs; None where strong scaling has fewer rows than GPUs."""
    path = Path(configs.__file__).parent / f"{preset}.yaml"
    batch = load_config(path, [WITHOUT_FILES]).batch
    rows = {key: getattr(batch, key) for key in ("clip", "ssl", "rec")}
    if is_weak:
        rows = {key: count * gpus // PRESETS[preset] for key, count in rows.items()}
    elif min(rows.values()) < gpus:
        return None
    streams = min(gpus, *rows.values())
    return load_config(path, [WITHOUT_FILES, f"data.streams={streams}", *(f"batch.{k}={n}" for k, n in rows.items())])


def broken_assumptions(config: Config, plan: LayoutPlan) -> Iterator[str]:
    """Assumptions of the planner that do not hold for this plan, the gravest first."""
    time, step = plan.time, plan.time.seconds
    latency = plan.latency
    if time.host > time.compute:
        yield "the host keeps up: launching takes longer than computing"
    if time.exposed > LIMIT * step:
        cause = "latency of many short messages" if latency > time.communication / 2 else "bandwidth"
        yield f"communication hides behind computing: {time.exposed / step:.0%} of the step is exposed ({cause})"
    if config.batch.clip > LARGEST_BATCH:
        yield f"the batch still learns: {config.batch.clip:,} pairs, published are {LARGEST_BATCH:,}"
    if plan.samples_per_second / plan.cluster.gpus > LOADER:
        yield f"one loader process a rank: {plan.samples_per_second / plan.cluster.gpus:,.0f} images/s wanted"
    if plan.memory > (1 - LIMIT) * plan.cluster.rates.memory_bytes:
        yield "memory: less than a tenth is left"


def scaling_table(preset: str, gpu: str, link: str, is_weak: bool) -> Iterator[str]:
    """Lines of a Markdown table."""
    from profiling.plan.search import search
    from profiling.plan.table import cluster_of

    yield "| GPUs | batch | layout | GiB | step ms | exposed | samples/s | a GPU | efficiency | MFU | breaks first |"
    yield "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---|"
    base = None
    for gpus in SIZES:
        config = config_at(preset, gpus, is_weak)
        if config is None:
            yield f"| {gpus:,} |  | fewer rows than GPUs |  |  |  |  |  |  |  | a row of every objective for each GPU |"
            continue
        plan = search(config, cluster_of(gpu, gpus, link, config), samples=1e9)[0]
        if not plan.fits:
            yield f"| {gpus:,} | {config.batch.clip:,} | nothing fits | {_gib(plan)} |  |  |  |  |  |  | memory |"
            continue
        each = plan.samples_per_second / gpus
        base = base or each
        yield (
            f"| {gpus:,} | {config.batch.clip:,} | {_layout(plan)} | {_gib(plan)} | {1000 * plan.time.seconds:.0f} | "
            f"{plan.time.exposed / plan.time.seconds:.0%} | {plan.samples_per_second:,.0f} | {each:,.1f} | "
            f"{each / base:.0%} | {plan.mfu:.2f} | {next(broken_assumptions(config, plan), '')} |"
        )


def _gib(plan: LayoutPlan) -> str:
    return f"{plan.memory / 2**30:.0f}"


def _layout(plan: LayoutPlan) -> str:
    variant = plan.variant
    parts = "" if variant.micro_batches == 1 else f", {variant.micro_batches} parts"
    again = "" if variant.checkpointing == "off" else f", {variant.checkpointing}"
    fp8 = "" if variant.linear == "bf16" else ", FP8"
    return f"{variant.name}{parts}{again}{fp8}"


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = CommandParser(prog="python -m profiling.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h100", choices=sorted(GPUS))
    parser.add_argument("--link", default=DEFAULT_LINKS)
    parser.add_argument("--preset", choices=sorted(PRESETS), action="append", help="only this one")
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it has found no GPU; nothing runs
    try:
        for preset in parsed.preset or PRESETS:
            for is_weak in (True, False):
                print(f"\n### {preset}, {'weak' if is_weak else 'strong'} scaling\n")
                for line in scaling_table(preset, parsed.gpu, parsed.link, is_weak):
                    print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
