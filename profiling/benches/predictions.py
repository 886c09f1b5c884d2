"""Benches of predictions against measurements: the planner's step time and a step's peak memory.

`plan`: a whole step of one process, forward to EMA, eager or compiled. In every round the machine's rates are measured,
then the step: on a shared machine both see the same moment. Published figures are of hardware that is not here; their
predictions use data sheets and the assumptions of profiling/plan/rates.py, none of which was fitted to them.

`step_memory`: ViT-S at 256 px under ZeRO-1, 2 and 3, on 1 and 2 ranks, each case in processes of its own. *measured* is
what tensors take, those an engine holds between steps and the most a step adds; *resident* is what the process grew by,
libraries' workspaces included. In a run malloc keeps freed blocks (engine/process_settings.py), so more is resident;
here it gives them back. `rounds` steps are measured, the largest counts; they hardly differ.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import configs
from configs import Config, load_config
from configs.deepspeed import load_ds_config
from data.batch import Batch
from engine.block_transforms import checkpoint_activations
from engine.build import BLOCK_CLASSES
from engine.process_settings import keep_freed_blocks
from engine.step import model_inputs
from engine.zero import DTYPES
from kernels.attention import resolve_attention
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from profiling.benches.recorder import BenchRecorder, BenchResult, VariantTiming, print_now
from profiling.benches.step import BenchStep, shared_loss
from profiling.benches.workload import random_batch, small_step
from profiling.cost.step_flops import step_flops
from profiling.instruments.machine import VariantTimes, describe, device, time_variants
from profiling.instruments.memory import peak_bytes, process_peak_bytes, resident_bytes, tensor_bytes
from profiling.plan.rates import measured_rates
from profiling.plan.search import LayoutPlan, search
from profiling.plan.step_time import ExecutionMode, step_time, step_work
from profiling.plan.table import cluster_of

PRESETS = Path(configs.__file__).parent
LINK = "nvlink,ib400"
WORKLOAD = "a step of one process; its prediction from rates measured in the same round"
# DINOv3's ViT-7B as its training config has it: no clip, no rec; one head here stands for its two.
DINOV3 = (
    "objectives.clip.weight=0", "objectives.rec.weight=0", "batch.rec=0", "batch.clip=4096", "batch.ssl=4096",
    "data.streams=256", "model.trunk.mlp_ratio=3", "model.trunk.drop_path=0.4", "model.trunk.layer_scale=1e-5",
    "model.trunk.norm=layernorm", "model.registers=4", "views.local_size=112", "model.prototypes.num=262144",
    "model.prototypes.hidden=8192", "model.prototypes.bottleneck=512",
)  # fmt: skip
WITHOUT_FILES = "objectives.rec.lpips_weights=none"


@dataclass(frozen=True)
class PlanCase:
    """A step that this machine can run."""

    name: str
    config: Config
    is_compiled: bool = False

    @property
    def attention(self) -> str:
        """The backend that auto becomes on this machine, in the config's precision."""
        return resolve_attention("auto", device(), DTYPES[self.config.optim.precision]).name

    @property
    def rows(self) -> RankBatchSizes:
        """One process has the whole batch."""
        return RankBatchSizes.per_rank(self.config, 1)

    def step(self) -> BenchStep:
        """The step to be timed, on random pixels and captions."""
        model = Pretrainer(self.config, self.rows, self.attention)
        checkpoint_activations(model, self.config.system.activation_checkpointing, tuple(BLOCK_CLASSES))
        batch = random_batch(self.config)
        return BenchStep(model, self.config, batch, model_inputs, shared_loss, is_compiled=self.is_compiled)

    def predicted(self, captions: Tensor) -> float:
        """Predicted seconds, from rates measured now."""
        rates = measured_rates(self.config, self.rows, self.attention, device())
        build = ExecutionMode(self.attention, self.is_compiled, device().type)
        flops = step_flops(self.config, self.rows, captions.numel(), backend=self.attention, device=device().type)
        work = step_work(self.config, self.rows, build, flops, captions.numel())
        return step_time(work, rates, [], None, 1).seconds


def cases() -> list[PlanCase]:
    """Steps to compare: eager, compiled, recomputed, and another architecture in float32."""
    demo = load_config(PRESETS / "demo.yaml", ["data.streams=1"])
    return [
        PlanCase("vtp_s, eager", small_step()),
        PlanCase("vtp_s, compiled", small_step(), is_compiled=True),
        PlanCase("vtp_s, eager, blocks computed again", small_step("system.activation_checkpointing=full")),
        PlanCase("demo, eager, fp32", demo),
    ]


def bench_plan(recorder: BenchRecorder) -> None:
    """Step times, and notes with predicted over measured."""
    keep_freed_blocks(device())
    rows, notes = [], []
    for case in cases():
        row, note = compare(case, recorder.rounds)
        rows.append(row)
        notes.append(note)
        print_now(f"plan: {note}")
        recorder.save(BenchResult("plan", WORKLOAD, rows[0].variant, tuple(rows), tuple(notes)))
    recorder.add(BenchResult("plan", WORKLOAD, rows[0].variant, tuple(rows), (*notes, *published_notes())))


def compare(case: PlanCase, rounds: int) -> tuple[VariantTiming, str]:
    """Measured time, and a note on predicted over measured."""
    step = case.step()
    captions = step.inputs(step.batch, device())["captions"].tokens_RC
    time_variants({"warm up": step}, rounds=1, warmups=1)
    measured: list[float] = []
    ratios: list[float] = []
    for _ in range(rounds):
        before = case.predicted(captions)
        measured += time_variants({case.name: step}, rounds=1, warmups=0)[case.name].seconds
        ratios.append((before + case.predicted(captions)) / 2 / measured[-1])
    times, ratio = VariantTimes(tuple(measured)), statistics.median(ratios)
    note = f"{case.name}: predicted over measured {ratio:.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    return VariantTiming(case.name, 1000 * times.median, times.spread, 1.0, None, None, rounds), note


def published_notes() -> list[str]:
    """Notes on published figures, each beside its prediction."""
    dinos = _plans("vtp_7b", "h100", 256, DINOV3)
    shipped = next(plan for plan in dinos if plan.variant.stage == 3 and plan.variant.persistence is None)
    layouts = " and ".join(f"{plan.samples_per_second / 256:.1f} ({_layout(plan)})" for plan in (dinos[0], shipped))
    vtp = _plans("vtp_l", "h800", 256, ("batch.clip=32768", "batch.ssl=8192", "batch.rec=4096", WITHOUT_FILES))[0]
    two_days = 2 * 86_400 * vtp.samples_per_second
    return [
        f"DINOv3 ViT-7B on 256 H100: predicted {layouts} images/s a GPU, the fastest layout and the shipped ZeRO-3; "
        "published 61,440 GPU-hours for 1M steps of 4,096, which is 18.5",
        f"VTP-L on 256 H800, clip 32,768: predicted {vtp.samples_per_second:,.0f} samples/s ({_layout(vtp)}), so "
        f"{two_days / 1e9:.1f}B samples in the two days that its author names; how many it saw is not published",
    ]


def _plans(preset: str, gpu: str, gpus: int, overrides: tuple[str, ...]) -> list[LayoutPlan]:
    """Plans of a preset, those that fit first, by speed."""
    config = load_config(PRESETS / f"{preset}.yaml", overrides)
    return search(config, cluster_of(gpu, gpus, LINK, config), samples=1e9)


def _layout(plan: LayoutPlan) -> str:
    """A layout in a few words."""
    variant = plan.variant
    return f"{variant.name}, checkpointing {variant.checkpointing}, {variant.linear}, MFU {plan.mfu:.2f}"


DEEPSPEED = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
SMALL = (
    "batch.clip=8",
    "batch.ssl=2",
    "batch.rec=2",
    "data.streams=2",
    "model.prototypes.num=2048",
    "system.compile=off",
)
WARM_UP = 2  # steps in which ZeRO-3 learns its order and the moments are made
MALLOC = "MALLOC_MMAP_THRESHOLD_"
TIMEOUT = 600.0  # seconds a case may take


@dataclass(frozen=True)
class MemoryCase:
    """An engine: its DeepSpeed JSON, its ranks, and what differs from the small step."""

    stage: str
    world_size: int
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = (override.rpartition("system.")[2] for override in self.overrides)
        return ", ".join((self.stage, f"{self.world_size} rank{'s' * (self.world_size > 1)}", *settings))

    def config(self) -> Config:
        """Of the whole run, over all ranks."""
        return small_step(*SMALL, *self.overrides)

    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed config with buckets of 8 MiB in bf16: the shipped ones are larger than this model."""
        given = load_ds_config(DEEPSPEED / f"{self.stage}.json", self.config(), self.world_size)
        return {**given, "zero_optimization": {**given["zero_optimization"], "reduce_bucket_size": 4 * 2**20}}


CASES = (
    MemoryCase("zero1", 1),
    MemoryCase("zero2", 2),
    MemoryCase("zero3", 1, ("optim.precision=fp32",)),
    MemoryCase("zero3", 2, ("system.activation_checkpointing=selective",)),
    MemoryCase("zero3", 2, ("system.activation_checkpointing=full",)),
    MemoryCase("zero3", 2, ("system.clip.micro_batches=2",)),
)


@dataclass(frozen=True)
class PeakComparison:
    """Bytes of a case's first rank."""

    case: MemoryCase
    predicted: int
    measured: int
    resident: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


@dataclass(frozen=True)
class PeakTable:
    """Predicted and measured peaks."""

    rows: tuple[PeakComparison, ...]
    notes: tuple[str, ...] = ()

    def as_table(self) -> Table:
        """A row a case, in MiB."""
        table = Table(title="step_memory: ViT-S at 256 px, 8 pairs over all ranks", title_justify="left")
        for column in ("engine", "predicted MiB", "measured MiB", "ratio", "resident MiB"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for row in self.rows:
            sizes = [f"{size / 2**20:.0f}" for size in (row.predicted, row.measured, row.resident)]
            table.add_row(str(row.case), sizes[0], sizes[1], f"{row.ratio:.3f}", sizes[2])
        return table

    def as_dict(self) -> dict[str, Any]:
        """A row a case, in bytes, and the machine."""
        rows = [{**vars(row), "case": str(row.case), "ratio": row.ratio} for row in self.rows]
        return {"name": "step_memory", "machine": describe(), "rows": rows, "notes": list(self.notes)}


def bench_step_memory(recorder: BenchRecorder, cases: tuple[MemoryCase, ...] = CASES) -> None:
    """Predicted and measured peaks, one case after the other."""
    rows = []
    for case in cases:
        rows.append(_measured(case, recorder.rounds))
        print_now(f"step_memory: {case}: predicted over measured {rows[-1].ratio:.3f}")
        recorder.save(PeakTable(tuple(rows)))
    recorder.add(PeakTable(tuple(rows)))


def _measured(case: MemoryCase, rounds: int) -> PeakComparison:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Queue[PeakComparison] = spawn.Queue()
        ranks = [
            spawn.Process(target=_rank, args=(case, rank, rounds, folder, results), daemon=True)
            for rank in range(case.world_size)
        ]
        with _malloc_returning_blocks():
            for process in ranks:
                process.start()
        found = _await(results, ranks)
        for process in ranks:
            process.join()
    return found


@contextmanager
def _malloc_returning_blocks() -> Iterator[None]:
    """glibc's malloc of a process started inside hands larger blocks back when they are freed."""
    before = os.environ.get(MALLOC)
    os.environ[MALLOC] = str(2**16)
    try:
        yield
    finally:
        os.environ.pop(MALLOC) if before is None else os.environ.update({MALLOC: before})


def _await(results: Queue[PeakComparison], ranks: list[SpawnProcess]) -> PeakComparison:
    """The first rank's figures; RuntimeError where a rank ends without."""
    while results.empty():
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank of this case ended early: its error stands above")
        time.sleep(0.2)
    return results.get()


def _rank(case: MemoryCase, rank: int, rounds: int, folder: str, results: Queue[PeakComparison]) -> None:
    """Run in a process: join the others, build the engine, step; the first rank sends the result."""
    alone = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world_size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in alone.items()})
    torch.set_num_threads(1)
    from engine import distributed
    from engine.build import build_pretraining
    from engine.step import train_step
    from profiling.cost.peak_memory import predict_peak

    comm = distributed.start(TIMEOUT / 60, rendezvous=f"file://{folder}/rendezvous")
    config, ds_config = case.config(), case.ds_config()
    resident, before = resident_bytes(), tensor_bytes()
    parts = build_pretraining(config, ds_config, comm)
    batch = _rank_batch(config, comm.world_size)
    attention = parts.engine.module.trunk.blocks[0].attn.backend
    for step in range(WARM_UP):
        train_step(parts, replace(batch, step=step), parts.centres, config)
    grown = process_peak_bytes() - resident  # before torch's profiler takes memory of its own
    held = sum(size for address, size in tensor_bytes().items() if address not in before)
    gc.disable()  # as in a run
    last = replace(batch, step=WARM_UP)
    added = max(peak_bytes(lambda: train_step(parts, last, parts.centres, config)) for _ in range(rounds))
    if rank == 0:
        predicted = predict_peak(config, ds_config, comm.world_size, attention, parts.device.type, batch)
        results.put(PeakComparison(case, predicted.device_bytes, held + added, grown))
    distributed.stop()


def _rank_batch(config: Config, world_size: int) -> Batch:
    """A batch of one rank's rows, the same on every rank."""
    batch = {name: getattr(config.batch, name) // world_size for name in ("clip", "ssl", "rec")}
    share = config.batch.model_copy(update=batch)
    return random_batch(config.model_copy(update={"batch": share}))
