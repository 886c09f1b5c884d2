"""What FP8 products do to learning: the losses of one run in bf16 and of the same run with FP8 in its blocks.

Both are the engine's own, from the same weights, over the same few batches of random pixels, which a model learns by
heart; so the curves fall, and fall together or apart. On a GPU vtp_l over 200 steps; on a CPU, where float8 products
are emulated at some ten million multiplications a second, a few steps of as little as has every part, which show that
the bench runs.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from configs import Config, UserError
from engine.step import train_step
from model.objectives.comm import Comm
from profiling.benches.one_rank import assembled, configured, one_rank
from profiling.machine import describe, require_bf16, sized
from profiling.measurement import Recorder, print_now
from profiling.workload import random_batch

PRESET, CLIP, STEPS = sized(cuda=("vtp_l", 32, 200), cpu=("study_mini", 8, 6))
SMALL = tuple(f"model.{tower}.{side}" for tower in ("trunk", "decoder", "text") for side in ("width=32", "depth=1"))
# The rate is as the preset has it at its own batch.
SHORT = (f"optim.steps={STEPS}", f"optim.lr_batch={CLIP}", *sized(cuda=(), cpu=SMALL))
NUM_BATCHES = sized(cuda=8, cpu=2)
KINDS = ("bf16", "fp8_torchao", "fp8_te")
LAST = 20  # steps whose mean is compared


@dataclass(frozen=True)
class Curves:
    """`losses`: the total of every step, by what multiplied."""

    workload: str
    losses: dict[str, list[float]]
    notes: tuple[str, ...] = ()

    def as_table(self) -> Table:
        """Some ten of the steps."""
        table = Table(title=f"fp8_losses: {self.workload}", title_justify="left")
        for column in ("step", *self.losses):
            table.add_column(column, justify="right")
        steps = len(self.losses["bf16"])
        for step in sorted({0, steps - 1, *range(0, steps, max(1, steps // 10))}):
            table.add_row(str(step), *(f"{curve[step]:.4f}" for curve in self.losses.values()))
        return table

    def as_dict(self) -> dict[str, Any]:
        """Every step."""
        about = {"name": "fp8_losses", "workload": self.workload, "machine": describe()}
        return about | {"losses": self.losses, "notes": list(self.notes)}


def run(recorder: Recorder) -> None:
    """One set of curves; the number of rounds does not count here: a run is one run."""
    require_bf16()
    with one_rank() as comm:
        _curves(comm, recorder)


def _curves(comm: Comm, recorder: Recorder) -> None:
    losses: dict[str, list[float]] = {}
    notes: list[str] = []
    workload = f"{PRESET}, {CLIP} clip images a step, {STEPS} steps over {NUM_BATCHES} batches of random pixels"
    for kind in KINDS:
        compiles = "off" if kind == "fp8_te" else "on"
        config = configured(PRESET, CLIP, *SHORT, f"system.linear={kind}", f"system.compile={compiles}")
        try:
            losses[kind] = _losses(config, comm)
            print_now(
                f"fp8_losses: {kind}: {losses[kind][0]:.4f} at the first step, {losses[kind][-1]:.4f} at the last"
            )
            recorder.save(Curves(workload, losses, tuple(notes)))
        except UserError as reason:
            notes.append(f"without {kind}: {reason}")
        gc.collect()
    notes += [_compared(kind, losses["bf16"], curve) for kind, curve in losses.items() if kind != "bf16"]
    recorder.add(Curves(workload, losses, tuple(notes)))


def _losses(config: Config, comm: Comm) -> list[float]:
    parts = assembled(config, comm)
    batches = [random_batch(config, seed) for seed in range(NUM_BATCHES)]
    centres, found = parts.centres, []
    for step in range(STEPS):
        record = train_step(parts, replace(batches[step % NUM_BATCHES], step=step), centres, config)
        centres = record.centres
        found.append(record.losses["total"])
    return [float(loss) for loss in found]


def _compared(kind: str, plain: list[float], other: list[float]) -> str:
    late, its_late = statistics.fmean(plain[-LAST:]), statistics.fmean(other[-LAST:])
    worst = max(abs(a - b) / abs(a) for a, b in zip(plain, other, strict=True))
    return (
        f"{kind}: {its_late / late - 1:+.2%} of bf16's loss over the last {len(plain[-LAST:])} steps, at most "
        f"{worst:.2%} apart at any; bf16's falls from {plain[0]:.3f} to {late:.3f}"
    )
