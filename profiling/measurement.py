"""What a bench found, and how it is shown: a table on the terminal, JSON for other programs.

bench = Measurement("attention", "64 segments of 257 tokens, 6 heads of 64, bf16", reference="sdpa", rows=[...])
bench.as_table()     # a rich table: variant, median ms, spread, times the reference's speed, peak memory, MFU
bench.as_dict()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from profiling.clock import Comparison, alternate
from profiling.machine import describe
from profiling.memory import peak_bytes

SLOW_SECONDS = 2.0  # calls that take longer are printed in every round, others in the first


def print_now(line: str) -> None:
    """Print a line, flushed: a bench may take minutes, and may print into a pipe."""
    print(line, flush=True)


@dataclass(frozen=True)
class Row:
    """One variant's figures."""

    variant: str
    median_ms: float
    spread: float  # half the interquartile distance, as a share of the median
    speedup: float  # over the reference; paired, median over rounds
    peak_mib: float | None
    mfu: float | None  # model FLOPs / time / measured matmul peak


@dataclass(frozen=True)
class Measurement:
    """A bench's rows. `workload` says in words and numbers what every variant computed."""

    name: str
    workload: str
    reference: str
    rows: tuple[Row, ...]
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
                f"{row.speedup:.2f}",
                "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                "" if row.mfu is None else f"{row.mfu:.0%}",
            )
        return table


def measure(
    name: str,
    workload: str,
    variants: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int,
    flops: float | None = None,
    peak: float | None = None,
    with_memory: bool = True,
    warmups: int = 2,
    notes: tuple[str, ...] = (),
) -> Measurement:
    """Time the variants in turns and measure the peak memory of each; print each time as it is measured.

    `flops` is what the workload needs, the same for all variants, and `peak` the machine's FLOP/s; both or neither.
    """

    def on_timing(variant: str, number: int, seconds: float) -> None:
        if number == 0:
            print_now(f"{name}: {variant}: {seconds:.1f} s to warm up")
        elif number == 1 or seconds > SLOW_SECONDS:
            print_now(f"{name}: {variant}: {1000 * seconds:,.1f} ms, round {number} of {rounds}")

    times = alternate(variants, rounds, warmups, on_timing)
    memory = {variant: peak_bytes(call) / 2**20 if with_memory else None for variant, call in variants.items()}
    rows = tuple(_row(variant, times, reference, memory[variant], flops, peak) for variant in variants)
    return Measurement(name, workload, reference, rows, notes)


def _row(
    variant: str, times: Comparison, reference: str, peak_mib: float | None, flops: float | None, peak: float | None
) -> Row:
    median = times[variant].median
    mfu = None if flops is None or peak is None else flops / median / peak
    speedup = times.ratio(reference, variant)
    return Row(variant, 1000 * median, times[variant].spread, speedup, peak_mib, mfu)
