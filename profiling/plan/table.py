"""Print plans: the ranked table, the sentences and the command below it.

plans = search(config, cluster_of("h100", 256, "nvlink,ib400", config), samples=1.1e9)
plan_table(config, plans, num_shown=8)        # a rich table
remarks(config, plans)                        # what was refused, what limits the best, what is assumed
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from configs import Config, UserError, load_config
from engine.build import resolve_compile
from engine.zero import DTYPES
from kernels.attention import resolve_attention
from model.describe import count_parameters
from model.packing import RankBatchSizes
from profiling.instruments.machine import device
from profiling.plan import rates
from profiling.plan.rates import THIS, measured_rates, parse_links, rates_of
from profiling.plan.search import CAPTIONS_FILLED, Cluster, LayoutPlan, search
from profiling.plan.step_time import HIDDEN_BY, ExecutionMode

NUM_SHOWN = 8
GIB = 2**30


def run(parsed: argparse.Namespace) -> int:
    """Plan and print; return the exit code: 0, 1 where nothing fits. Raises UserError for a mistake."""
    config = load_config(parsed.config, parsed.overrides)
    if config.model.conv is not None:
        raise UserError(
            f"--config {parsed.config}: the planner's times are of transformers, and model.conv is set; its memory "
            "can be predicted (profiling.cost.peak_memory), its time must be measured"
        )
    samples = parsed.samples or config.optim.steps * config.batch.clip
    plans = search(config, cluster_of(parsed.gpu, parsed.gpus, parsed.link, config), samples, parsed.all)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    best = plans[0]
    if best.fits:
        console.print(plan_table(config, plans, len(plans) if parsed.all else NUM_SHOWN))
    for remark in remarks(config, plans):
        console.print(remark, markup=False, soft_wrap=True)
    if parsed.json:
        parsed.json.write_text(json.dumps([plan.as_dict() for plan in plans], indent=2) + "\n")
    if not best.fits:
        print("error: nothing fits; take more GPUs, larger ones, or smaller batches", file=sys.stderr)
        return 1
    if parsed.ds_config_out:
        parsed.ds_config_out.write_text(json.dumps(best.variant.ds_json(), indent=2) + "\n")
    elif not best.variant.is_shipped:
        console.print("Its DeepSpeed JSON is none of the shipped ones: write it with --ds_config-out FILE.")
    console.print(launch_command(parsed, best), markup=False, soft_wrap=True)
    return 0


def cluster_of(gpu: str, gpus: int, link: str, config: Config) -> Cluster:
    """A cluster of a GPU by name, or of this machine. Raises UserError for unknown names."""
    if gpu != THIS:
        attention = "flash3" if gpu.startswith("h") else "varlen"
        mode = ExecutionMode(attention, is_compiled=config.system.compile != "off")
        return Cluster(gpus, rates_of(gpu), parse_links(link, gpu), mode)
    here = device()
    attention = resolve_attention(config.system.attention, here, DTYPES[config.optim.precision]).name
    measured = measured_rates(config, RankBatchSizes.per_rank(config, gpus), attention, here)
    return Cluster(gpus, measured, None, ExecutionMode(attention, resolve_compile(config, here)[0], here.type))


def plan_table(config: Config, plans: list[LayoutPlan], num_shown: int) -> Table:
    """The plans that fit, by speed."""
    cluster = plans[0].cluster
    rows, capacity = plans[0].rows, cluster.rates.memory_bytes / GIB
    title = (
        f"{config.name} on {cluster.gpus} x {cluster.rates.name}: clip {rows.clip}, ssl {rows.ssl}, rec {rows.rec} "
        f"rows a rank; {plans[0].samples:.3g} samples; {capacity:.1f} GiB usable on each"
    )
    table = Table(title=title, title_justify="left")
    for column in ("ZeRO", "parts", "checkpointing", "blocks", "GiB", "compute", "exposed", "step ms", "sent GB",
                   "samples/s", "a GPU", "MFU", "days", "GPU-hours", "MWh"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("ZeRO", "checkpointing", "blocks") else "right")
    for plan in [plan for plan in plans if plan.fits][:num_shown]:
        time, variant = plan.time, plan.variant
        table.add_row(
            variant.name, str(variant.micro_batches), variant.checkpointing, variant.linear,
            f"{plan.memory / GIB:.1f}", f"{1000 * time.compute:.0f}", f"{1000 * time.exposed:.0f}",
            f"{1000 * time.seconds:.0f}", f"{plan.wire_bytes / 1e9:.1f}", f"{plan.samples_per_second:,.0f}",
            f"{plan.samples_per_second / plan.cluster.gpus:.1f}", f"{plan.mfu:.2f}", f"{plan.days:.2f}",
            f"{plan.gpu_hours:,.0f}", f"{plan.kilowatt_hours / 1000:.1f}",
        )  # fmt: skip
    return table


def remarks(config: Config, plans: list[LayoutPlan]) -> list[str]:
    """Sentences below the table: parameters, what was refused, what limits the best, what is assumed."""
    counts = count_parameters(config, plans[0].rows)
    trained = sum(count for name, count in counts.items() if name != "teacher")
    found = [f"Built on the meta device: {sum(counts.values()):,} parameters, {trained:,} of them trained."]
    refused = [plan for plan in plans if not plan.fits]
    if refused:
        least, usable = refused[0], plans[0].cluster.rates.memory_bytes / GIB
        variant = least.variant
        name = f"{variant.name}, {variant.micro_batches} parts, checkpointing {variant.checkpointing}, {variant.linear}"
        found.append(
            f"Refused: {len(refused)} of {len(plans)} variants need more than {usable:.1f} GiB a rank; the smallest of "
            f"them, {name}, {least.memory / GIB:.1f} GiB."
        )
    if plans[0].fits:
        found.append(f"The best is limited by {plans[0].time.limit}. Its memory at the worst moment of a step:")
        found.append(plans[0].footprint.table())
    found.append(_assumptions(plans[0].cluster))
    return found


def _assumptions(cluster: Cluster) -> str:
    if cluster.links is None:
        return (
            "Rates were measured on this machine, one rank alone; traffic between ranks and waiting for data take no "
            "time in this plan."
        )
    return (
        f"Assumed, not measured: products reach {rates.OF_BF16} of the bf16 peak ({rates.OF_FP8} of FP8's), attention "
        f"{rates.OF_ATTENTION}, memory {rates.OF_MEMORY}, links {rates.OF_LINK} of their data sheets; collectives hide "
        f"behind {HIDDEN_BY} of the compute; captions fill {CAPTIONS_FILLED} of their slots; GPUs draw "
        f"{rates.POWER_SHARE} of their limit. Not in it: waiting for data, decoding on the GPU, stragglers, reports, "
        "checkpoints, restarts; of energy hosts, network and cooling."
    )


def launch_command(arguments: argparse.Namespace, plan: LayoutPlan) -> str:
    """The command that starts the planned run."""
    shipped = f"configs/deepspeed/zero{plan.variant.stage}.json"
    ds_config = arguments.ds_config_out or (shipped if plan.variant.is_shipped else "FILE")
    parts = [f"--config {arguments.config}", f"--ds_config {ds_config}", *arguments.overrides, *plan.variant.overrides]
    return "deepspeed --hostfile hosts engine/launch.py " + " ".join(parts)
