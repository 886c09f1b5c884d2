"""What a study would do: every cell with its compute, its state, and how long what is missing may take.

overview(layout, cells)        # a rich table, and the sum under it
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from evaluation.study.carry_out import is_done, read_record
from evaluation.study.preset import Cell
from evaluation.study.results import state_of
from evaluation.study.stages import Layout


def overview(layout: Layout, cells: Sequence[Cell], threads: int) -> Table:
    """The cells in their order; minutes are those of a tokenizer that is not there yet."""
    rate = measured_rate(layout, cells) or layout.preset.flops_per_second * threads * layout.ranks
    title = f"{layout.preset.name}: {len(cells)} cells in {layout.out}, at {rate / 1e9:.0f} GFLOP a second"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("cell", footer="to be trained")
    table.add_column("objective")
    for name in ("steps", "TFLOP"):
        table.add_column(name, justify="right")
    table.add_column("state")
    minutes = [_minutes(layout, cell, rate) for cell in cells]
    table.add_column("minutes of training", justify="right", footer=f"{sum(minutes):.0f}")
    for cell, needed in zip(cells, minutes, strict=True):
        table.add_row(
            cell.name, cell.objective.title, str(cell.steps), f"{cell.flops / 1e12:.1f}", state_of(layout, cell),
            f"{needed:.1f}" if needed else "",
        )  # fmt: skip
    return table


def measured_rate(layout: Layout, cells: Sequence[Cell]) -> float | None:
    """FLOPs a second of the tokenizers that are trained, starting up included; None while there are none."""
    flops = seconds = 0.0
    for cell in cells:
        tokenizer = layout.stages(cell)[0]
        if is_done(layout.cell(cell), tokenizer):
            flops += cell.flops
            seconds += read_record(layout.cell(cell), tokenizer)["seconds"]
    return flops / seconds if seconds else None


def _minutes(layout: Layout, cell: Cell, rate: float) -> float:
    is_there = is_done(layout.cell(cell), layout.stages(cell)[0])
    return 0.0 if is_there else cell.flops / rate / 60
