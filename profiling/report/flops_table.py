"""The report's table of FLOPs: the analytic count of one step of one rank, for the configuration a run resolved."""

from __future__ import annotations

from configs import UserError
from model.rows import Rows
from profiling.flops import PASSES
from profiling.report.blocks import Block, Cell, Sentence, Table
from profiling.report.data import Run
from profiling.step.flops import step_flops

_WHY = "Captions count with their whole context: how many slots packing takes, only the run's batches know."


def flops_table(run: Run, label: str) -> list[Block]:
    """GFLOP by component and pass, the sum below; a sentence where the count cannot be made."""
    ranks = run.world_size
    try:
        config = run.pretraining
        if config is None or ranks is None:
            raise UserError("it needs config.yaml, and the number of ranks (machine.json).")
        counted = step_flops(config, Rows.per_rank(config, ranks))
    except UserError as error:
        return [Sentence(f"{label} has no table of FLOPs: {error}")]
    rows: list[list[Cell]] = [
        [part.name, part.objective, *(getattr(part, key) / 1e9 for key in PASSES)] for part in counted.components
    ]
    rows.append(["sum", "", *(counted.total(key) / 1e9 for key in PASSES)])
    caption = f"GFLOP of one step of one rank of {label} ({ranks} ranks)"
    return [Table(caption, ["component", "objective", *PASSES], rows), Sentence(_WHY)]
