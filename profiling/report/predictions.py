"""What was predicted beside what was measured: memory of a rank, and bytes of collectives.

memory_tables(run, "demo")      # states by profiling/step/footprint.py, and the measured peak of every rank
traffic_table(run, "demo")      # collectives by profiling/step/communication.py, and what the run counted
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from configs import Config, UserError
from profiling.report.blocks import Block, Cell, Sentence, Table
from profiling.report.data import Run

if TYPE_CHECKING:
    from profiling.step.footprint import Component

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
T = TypeVar("T")
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def memory_tables(run: Run, label: str) -> list[Block]:
    """What a rank holds at a step's worst moment by prediction, and under it what ranks held at most."""
    from profiling.step.peak import predict_peak  # imports DeepSpeed, which talks

    machine = run.machine or {}
    attention = "matmul" if machine.get("attention") == "matmul" else "sdpa"
    device = "cpu" if machine.get("device", "cpu") == "cpu" else "cuda"
    blocks: list[Block] = []
    try:
        predicted = _predicted(run, partial(predict_peak, attention=attention, device=device))
        rows: list[list[Cell]] = [[each.name, each.bytes / 2**30, _where(each)] for each in predicted.components]
        rows.append(["predicted peak on the device", predicted.device_bytes / 2**30, ""])
        rows += _measured(run)
        blocks.append(Table(f"GiB of one rank of {label}, predicted and measured", ["", "GiB", ""], rows))
        blocks.append(Sentence(_compared(device, run.last("memory/peak_max_gib"), predicted.device_bytes / 2**30)))
    except UserError as error:
        blocks.append(Sentence(f"{label} has no predicted memory: {error}"))
    if run.peak_gib is not None:
        said = f"Peak memory of the first rank of {label}: {run.peak_gib:.2f} GiB, as the run said at its end."
    else:
        said = f"{label} has not said its peak memory: a run does when it reaches its last step."
    return [*blocks, Sentence(said)]


def _measured(run: Run) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for key, name in (("min", "least"), ("mean", "mean"), ("max", "most")):
        gib = run.last(f"memory/peak_{key}_gib")
        if gib is not None:
            rows.append([f"measured peak, {name} of all ranks", gib, ""])
    if rows and (rank := run.last("memory/peak_rank")) is not None:
        rows[-1][-1] = f"rank {rank:.0f}"
    return rows


def _where(component: Component) -> str:
    if component.is_on_host:
        return "on the host"
    return "" if component.is_static else "in a step"


def _compared(device: str, measured_gib: float | None, predicted_gib: float) -> str:
    said = (
        "The prediction sums the tensors that are there at the worst moment of a step; captions are as long as the "
        "web's, and an allocator takes more than it gives out."
    )
    if device == "cpu":
        said += (
            " On a CPU the peak is the process's resident memory: its libraries, its loader and freed blocks that it "
            "keeps are in it, and buffers whose pages were never touched are not."
        )
    elif measured_gib is not None:
        said += f" The rank with the most took {measured_gib / predicted_gib:.2f} times the prediction."
    return said


def traffic_table(run: Run, label: str) -> list[Block]:
    """MB a step and rank of every kind: predicted for a steady step, counted in the median report, and their ratio."""
    from profiling.step import communication  # as above

    counted = {kind: run.median(f"comm/{kind}_mb") for kind in KINDS}
    try:
        collectives = _predicted(run, communication.predict)
    except UserError as error:
        return [Sentence(f"{label} has no predicted bytes: {error}")]
    if not collectives:
        return [Sentence(f"{label} has one rank, which sends nothing.")]
    by_kind = communication.by_kind(collectives)
    compared: list[list[Cell]] = []
    for kind in KINDS:
        megabytes, seen = by_kind.get(kind, 0) / 1e6, counted[kind]
        compared.append([kind, megabytes, seen, seen / megabytes if seen is not None and megabytes else None])
    world_size = run.world_size or 1
    rows: list[list[Cell]] = [
        [each.purpose, each.kind, each.message_bytes / 1e6, each.wire_bytes(world_size) / 1e6] for each in collectives
    ]
    return [
        Table(f"MB a step of {label}, whole messages", ["", "predicted", "counted", "counted / predicted"], compared),
        Table(f"Predicted collectives of {label}", ["", "kind", "message, MB", "sent by a rank, MB"], rows),
        Sentence(
            "Counted is all that ranks exchanged as tensors since the report before, over its steps. What reports "
            "themselves all-reduce (means, phases, memory, flags: some 200 bytes and 24 to 32 a rank) is in it, and "
            "not in the prediction; bad samples and joules, which travel pickled, are in neither. The first steps of "
            "ZeRO-3 gather more, until it knows their order; the median report leaves them out."
        ),
    ]


def _predicted(run: Run, predict: Callable[[Config, dict[str, Any], int], T]) -> T:
    """UserError where the run's files do not allow it."""
    config = run.pretraining
    if config is None or run.ds_config is None or run.world_size is None:
        raise UserError("it needs config.yaml, ds_config.json and the number of ranks (machine.json)")
    try:
        return predict(config, run.ds_config, run.world_size)
    except _DAMAGED as error:
        raise UserError(f"ds_config.json is none that it can be predicted from ({error})") from None
