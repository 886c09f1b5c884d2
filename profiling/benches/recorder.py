"""Time a bench's variants and record what is known so far: tables on the terminal, JSON for other programs.

recorder = BenchRecorder(rounds=11, file=Path("attention.json"))
result = recorder.measure("attention", "64 segments of 257 tokens, 6 heads of 64, bf16", variants, reference="sdpa")
result.as_table()      # variant, median ms, spread, times the reference's speed, peak memory, MFU
recorder.add(result)   # print the table

The file is rewritten whenever a row changes, so that a bench that is killed leaves what it had measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from data.durable_files import write_atomic
from profiling.instruments.machine import VariantTimes, describe, time_variants
from profiling.instruments.memory import peak_bytes

SLOW_SECONDS = 2.0  # calls that take longer are printed in every round, others in the first


def print_now(line: str) -> None:
    """Print a line, flushed: a bench may take minutes, and may print into a pipe."""
    print(line, flush=True)


class BenchOutput(Protocol):
    """What a bench records: a BenchResult, or a table of its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences, printed below the table."""
        ...

    def as_table(self) -> Table:
        """For a terminal."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        ...


@dataclass(frozen=True)
class VariantTiming:
    """One variant's figures."""

    variant: str
    median_ms: float
    spread: float  # half the interquartile distance, as a share of the median
    speedup: float | None  # over the reference; paired, median over rounds; None until the reference is timed
    peak_mib: float | None
    mfu: float | None  # model FLOPs / time / measured matmul peak
    rounds: int = 0  # timed so far; 0: the median is the last warm-up call
    warm_up_s: float = 0.0  # all warm-up calls, compiling included


@dataclass(frozen=True)
class BenchResult:
    """A bench's rows. `workload` describes what every variant computed."""

    name: str
    workload: str
    reference: str
    rows: tuple[VariantTiming, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the machine it was taken on."""
        rows = [vars(row) for row in self.rows]
        about = {"name": self.name, "workload": self.workload, "reference": self.reference}
        return about | {"machine": describe(), "rows": rows, "notes": list(self.notes)}

    def as_table(self) -> Table:
        """For a terminal; ± is the spread over rounds."""
        table = Table(title=f"{self.name}: {self.workload}", title_justify="left")
        for column in ("variant", "median ms", "±", f"x {self.reference}", "peak MiB", "MFU"):
            table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=column == "variant")
        for row in self.rows:
            table.add_row(
                row.variant,
                f"{row.median_ms:.2f}",
                f"{row.spread:.0%}",
                "" if row.speedup is None else f"{row.speedup:.2f}",
                "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                "" if row.mfu is None else f"{row.mfu:.0%}",
            )
        return table


class BenchRecorder:
    """Collect what one bench measures. `rounds`: times each variant runs; `file`: JSON, rewritten at every change.

    `is_dry`: the figures do not count, and benches that have a smaller size take it.
    """

    def __init__(self, rounds: int, file: Path | None = None, is_dry: bool = False) -> None:
        self.rounds = rounds
        self.is_dry = is_dry
        self.results: list[BenchOutput] = []
        self._num_complete = 0
        self._file = file
        self._console = Console(width=None if sys.stdout.isatty() else 120)

    def measure(
        self,
        name: str,
        workload: str,
        variants: Mapping[str, Callable[[], object]],
        reference: str,
        flops: float | None = None,
        peak: float | None = None,
        with_memory: bool = True,
        warmups: int = 2,
        notes: tuple[str, ...] = (),
    ) -> BenchResult:
        """Time the variants in turns and measure the peak memory of each; print and save each figure as it comes.

        `flops` is what the workload needs, the same for all variants, and `peak` the machine's FLOP/s; both or neither.
        """
        timed = {variant: _VariantRecord(warmups) for variant in variants}

        def result() -> BenchResult:
            known = {variant: each for variant, each in timed.items() if each.seconds}
            rows = (each.row(variant, timed[reference], flops, peak) for variant, each in known.items())
            return BenchResult(name, workload, reference, tuple(rows), notes)

        def on_timing(variant: str, number: int, seconds: float) -> None:
            timed[variant].take(number, seconds)
            if number == 0:
                print_now(f"{name}: {variant}: {timed[variant].warm_up:.1f} s to warm up")
            elif number == 1 or (number > 1 and seconds > SLOW_SECONDS):
                print_now(f"{name}: {variant}: {1000 * seconds:,.1f} ms, round {number} of {self.rounds}")
            else:
                return
            self.save(result())

        time_variants(variants, self.rounds, warmups, on_timing)
        for variant, call in variants.items() if with_memory else ():
            self.save(result())
            timed[variant].peak_mib = peak_bytes(call) / 2**20
        self.save(result())
        return result()

    def save(self, result: BenchOutput) -> None:
        """Save a result so far: the next one replaces it, until `add` completes it."""
        self.results[self._num_complete :] = [result]
        if self._file is not None:
            content = json.dumps([each.as_dict() for each in self.results], indent=2) + "\n"
            write_atomic(self._file, content, is_synced=False)

    def add(self, result: BenchOutput) -> None:
        """Save a complete result, and print its table and its notes."""
        self.save(result)
        self._num_complete = len(self.results)
        self._console.print(result.as_table())
        for note in result.notes:
            self._console.print(note)
        sys.stdout.flush()


@dataclass
class _VariantRecord:
    """Calls of one variant: the rounds, or the last of `warmups` warm-up calls before the first round."""

    warmups: int
    seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    warm_up: float = 0.0
    peak_mib: float | None = None

    def take(self, number: int, seconds: float) -> None:
        if number < 1:
            self.warm_up += seconds
        if number == 0 and self.warmups > 1:  # a first call compiles, and says nothing
            self.seconds = [seconds]
        elif number >= 1:
            self.seconds = [*self.seconds, seconds] if self.rounds else [seconds]
            self.rounds = number

    def row(self, variant: str, reference: _VariantRecord, flops: float | None, peak: float | None) -> VariantTiming:
        times = VariantTimes(tuple(self.seconds))
        pairs = list(zip(reference.seconds, self.seconds, strict=False))  # in a round some are timed, some not yet
        return VariantTiming(
            variant,
            1000 * times.median,
            times.spread,
            statistics.median(slow / fast for slow, fast in pairs) if pairs else None,
            self.peak_mib,
            None if flops is None or peak is None else flops / times.median / peak,
            self.rounds,
            self.warm_up,
        )
