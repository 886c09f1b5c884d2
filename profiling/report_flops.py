"""The report's table of FLOPs: the analytic count of one step of one rank, for the configuration a run resolved."""

from __future__ import annotations

import json

from configs import UserError
from model.rows import Rows
from profiling.flops import PASSES
from profiling.report_blocks import Block, Cell, Sentence, Table
from profiling.report_data import Run
from profiling.step_flops import step_flops

_WHY = "Captions count with their whole context: how many slots packing takes, only the run's batches know."


def flops_table(run: Run, label: str) -> list[Block]:
    """GFLOP by component and pass, the sum below; a sentence where the count cannot be made."""
    ranks = _num_ranks(run.ds_config_text)
    if run.config is None or ranks is None:
        return [
            Sentence(f"{label} has no table of FLOPs: it needs config.yaml, and the batch sizes in ds_config.json.")
        ]
    try:
        counted = step_flops(run.config, Rows.per_rank(run.config, ranks))
    except UserError as error:
        return [Sentence(f"{label} has no table of FLOPs: {error}")]
    rows: list[list[Cell]] = [
        [part.name, part.objective, *(getattr(part, key) / 1e9 for key in PASSES)] for part in counted.components
    ]
    rows.append(["sum", "", *(counted.total(key) / 1e9 for key in PASSES)])
    caption = f"GFLOP of one step of one rank of {label} ({ranks} ranks)"
    return [Table(caption, ["component", "objective", *PASSES], rows), Sentence(_WHY)]


def _num_ranks(ds_config_text: str | None) -> int | None:
    """train_batch_size over what one rank takes of it; None where the file does not say."""
    try:
        ds_config = json.loads(ds_config_text or "")
        per_rank = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"]
        ranks = ds_config["train_batch_size"] / per_rank
        whole = int(ranks)
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None
    return whole if whole >= 1 and ranks == whole else None
