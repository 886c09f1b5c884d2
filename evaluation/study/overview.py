"""What a study would do: every cell with its compute, its state, and how long what is missing may take.

    overview(layout, cells, threads=1)        # a rich table, the sum below

A tokenizer's time is its FLOPs over a rate, what follows takes the same time in every cell. Both are those of the cells
that are there, once there are any, and before that the preset's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table

from evaluation.study.carry_out import is_done, read_record
from evaluation.study.preset import Cell
from evaluation.study.results import state_of
from evaluation.study.stages import Layout, Stage


def overview(layout: Layout, cells: Sequence[Cell], threads: int, known: Collection[str] = ()) -> Table:
    """The cells in their order; minutes are those that one process needs for what is not there yet. Cells in `known`
    need none."""
    rate, rest = _rate(layout, cells, threads), _rest(layout, cells, threads)
    title = f"{layout.preset.name}: {len(cells)} cells in {layout.out}, at {rate / 1e9:.0f} GFLOP a second"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("cell", footer="missing", no_wrap=True)  # what --only matches: never cut off
    table.add_column("learns from")
    for name in ("steps", "TFLOP"):
        table.add_column(name, justify="right")
    table.add_column("state")
    states = [("known" if cell.name in known else state_of(layout, cell)) for cell in cells]
    minutes = [
        0.0 if state == "known" else _seconds(layout, cell, rate, rest) / 60
        for cell, state in zip(cells, states, strict=True)
    ]
    table.add_column("minutes", justify="right", footer=f"{sum(minutes):.0f}")
    for cell, state, needed in zip(cells, states, minutes, strict=True):
        table.add_row(
            cell.name, cell.objective.title, str(cell.steps), f"{cell.flops / 1e12:.1f}", state,
            f"{needed:.1f}" if needed else "",
        )  # fmt: skip
    return table


def _rate(layout: Layout, cells: Sequence[Cell], threads: int) -> float:
    """FLOPs a second of a tokenizer's training, starting up included."""
    flops = seconds = 0.0
    for cell in cells:
        tokenizer = layout.stages(cell)[0]
        if is_done(layout.cell(cell), tokenizer):
            flops += cell.flops
            seconds += _taken(layout, cell, tokenizer)
    return flops / seconds if seconds else layout.preset.flops_per_second * threads * layout.ranks


def _rest(layout: Layout, cells: Sequence[Cell], threads: int) -> dict[str, float]:
    """Seconds of each stage behind the tokenizer."""
    found: dict[str, float] = {}
    for name, assumed in layout.preset.seconds.items():
        taken = [
            _taken(layout, cell, stage)
            for cell in cells
            for stage in layout.stages(cell)
            if stage.name == name and is_done(layout.cell(cell), stage)
        ]
        found[name] = sum(taken) / len(taken) if taken else assumed / threads
    return found


def _seconds(layout: Layout, cell: Cell, rate: float, rest: dict[str, float]) -> float:
    missing = [stage.name for stage in layout.stages(cell) if not is_done(layout.cell(cell), stage)]
    return sum(cell.flops / rate if name == "tokenizer" else rest[name] for name in missing)


def _taken(layout: Layout, cell: Cell, stage: Stage) -> float:
    seconds: float = read_record(layout.cell(cell), stage)["seconds"]
    return seconds
