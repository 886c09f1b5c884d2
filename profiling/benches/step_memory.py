"""The predicted peak of a step against what engines take: ViT-S at 256 px under ZeRO-1, 2 and 3, on 1 and 2 ranks.

Every case runs in processes of its own. *measured* is what tensors take, those an engine holds between steps and the
most a step adds; *resident* is what the process grew by, libraries' workspaces with it. In a run malloc keeps freed
blocks (engine/host_memory.py) and more is resident; here it gives them back. `rounds` steps are measured, the largest
counts; they hardly differ.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
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

from configs import Config
from configs.ds import load_ds_config
from data.batch import Batch
from profiling.machine import describe
from profiling.measurement import Recorder, print_now
from profiling.memory import peak_bytes, process_peak_bytes, resident_bytes, tensor_bytes
from profiling.workload import random_batch, small_step

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
class Case:
    """An engine: its DeepSpeed JSON, its ranks, and what differs from the small step."""

    stage: str
    world_size: int
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = (override.rpartition("system.")[2] for override in self.overrides)
        return ", ".join((self.stage, f"{self.world_size} rank{'s' * (self.world_size > 1)}", *said))

    def config(self) -> Config:
        """That of the whole run; a rank has its share of the batch."""
        return small_step(*SMALL, *self.overrides)

    def ds_config(self) -> dict[str, Any]:
        """With buckets of 8 MiB in bf16: the shipped ones are larger than this model, and would be most of it."""
        given = load_ds_config(DEEPSPEED / f"{self.stage}.json", self.config(), self.world_size)
        return {**given, "zero_optimization": {**given["zero_optimization"], "reduce_bucket_size": 4 * 2**20}}


CASES = (
    Case("zero1", 1),
    Case("zero2", 2),
    Case("zero3", 1, ("optim.precision=fp32",)),
    Case("zero3", 2, ("system.activation_checkpointing=selective",)),
    Case("zero3", 2, ("system.activation_checkpointing=full",)),
    Case("zero3", 2, ("system.clip.micro_batches=2",)),
)


@dataclass(frozen=True)
class Found:
    """Bytes of a case's first rank."""

    case: Case
    predicted: int
    measured: int
    resident: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


@dataclass(frozen=True)
class Peaks:
    """What this bench shows."""

    rows: tuple[Found, ...]
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


def run(recorder: Recorder, cases: tuple[Case, ...] = CASES) -> None:
    """All cases, one after the other."""
    rows = []
    for case in cases:
        rows.append(_measured(case, recorder.rounds))
        print_now(f"step_memory: {case}: predicted over measured {rows[-1].ratio:.3f}")
        recorder.save(Peaks(tuple(rows)))
    recorder.add(Peaks(tuple(rows)))


def _measured(case: Case, rounds: int) -> Found:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Queue[Found] = spawn.Queue()
        ranks = [
            spawn.Process(target=_rank, args=(case, rank, rounds, folder, results), daemon=True)
            for rank in range(case.world_size)
        ]
        with _returning_blocks():
            for process in ranks:
                process.start()
        found = _await(results, ranks)
        for process in ranks:
            process.join()
    return found


@contextmanager
def _returning_blocks() -> Iterator[None]:
    """glibc's malloc of a process started inside hands larger blocks back when they are freed."""
    before = os.environ.get(MALLOC)
    os.environ[MALLOC] = str(2**16)
    try:
        yield
    finally:
        os.environ.pop(MALLOC) if before is None else os.environ.update({MALLOC: before})


def _await(results: Queue[Found], ranks: list[SpawnProcess]) -> Found:
    """The first rank's figures; RuntimeError where a rank ends without."""
    while results.empty():
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank of this case ended early: its error stands above")
        time.sleep(0.2)
    return results.get()


def _rank(case: Case, rank: int, rounds: int, folder: str, results: Queue[Found]) -> None:
    """A process: joins the others, builds the engine, steps. The first rank tells."""
    alone = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world_size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in alone.items()})
    torch.set_num_threads(1)
    from engine import world
    from engine.assemble import assemble
    from engine.step import train_step
    from profiling.step.peak import predict_peak

    comm = world.start(TIMEOUT / 60, rendezvous=f"file://{folder}/rendezvous")
    config, ds_config = case.config(), case.ds_config()
    resident, before = resident_bytes(), tensor_bytes()
    parts = assemble(config, ds_config, comm)
    batch = _share(config, comm.world_size)
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
        results.put(Found(case, predicted.device_bytes, held + added, grown))
    world.stop()


def _share(config: Config, world_size: int) -> Batch:
    """A rank's rows, the same on every rank."""
    batch = {name: getattr(config.batch, name) // world_size for name in ("clip", "ssl", "rec")}
    share = config.batch.model_copy(update=batch)
    return random_batch(config.model_copy(update={"batch": share}))
