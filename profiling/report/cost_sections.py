"""The parts of a report that compare a run with predictions: FLOPs, memory, bytes of collectives, roofline.

flops_table(run, "demo")        # GFLOP by component and pass (profiling/cost/step_flops.py)
memory_tables(run, "demo")      # the predicted peak (profiling/cost/peak_memory.py), and the measured one of every rank
traffic_table(run, "demo")      # predicted collectives (profiling/cost/communication.py), and counted bytes
rooflines([run])                # every timed phase under what its machine can compute and move at most
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from configs import Config, UserError
from model.packing import RankBatchSizes
from profiling.cost.flops import PASSES
from profiling.cost.step_flops import step_flops
from profiling.report.blocks import Cell, Paragraph, ReportBlock, ReportTable, RooflinePlot
from profiling.report.metrics import labelled, side_by_side
from profiling.report.run_record import RunRecord, number

if TYPE_CHECKING:  # what imports the engine is imported in the functions: DeepSpeed prints when it is imported
    from profiling.cost.roofline import PhaseWork, Roof

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
WORK_COLUMNS = ["phase", "GFLOP", "MB moved", "FLOP/byte", "MB of products", "FLOP/byte of products"]
SPEED_COLUMNS = ["phase", "FLOP/byte", "ms", "GFLOP/s", "roof, GFLOP/s", "of the roof", "bound by"]
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # what an edited ds_config.json raises
T = TypeVar("T")
CAPTION_SLOTS = "Captions count with their whole context: how many slots packing takes is not known before the run."
MEMORY_NOTE = (
    "The prediction sums the tensors that are alive at the worst moment of a step; captions are as long as the web's, "
    "and an allocator takes more than it gives out."
)
CPU_MEMORY_NOTE = (
    " On a CPU the peak is the process's resident memory: its libraries, its loader and freed blocks that it keeps are "
    "in it, and buffers whose pages were never touched are not."
)
TRAFFIC_NOTE = (
    "Counted is all that ranks exchanged as tensors since the report before, over its steps. What reports themselves "
    "all-reduce (means, phases, memory, flags: some 200 bytes and 24 to 32 a rank) is in it, and not in the "
    "prediction; bad samples and joules, which are sent pickled, are in neither. The first steps of ZeRO-3 gather "
    "more, until it knows their order; the median report leaves them out."
)
ROOFLINE_NOTE = (
    "FLOPs are those of products, as in the table of FLOPs; AdamW counts with 15 operations a weight, the EMA with 3. "
    "MB moved: what the operands and results of every operator of an eager step hold, views left out. MB of products: "
    "what would be left of it if all between two products were fused into them. Both are one rank's, counted on the "
    "run's model and batch, as operators of the CPU. Milliseconds are medians over reports of means over ranks. "
    "Collectives, the loader and ZeRO's own copies move bytes too, and are not counted. More than the whole roof means "
    "that caches served what is counted as moved, or that the peaks were measured in a slower moment."
)


def flops_table(run: RunRecord, label: str) -> list[ReportBlock]:
    """GFLOP of one step by component and pass, the sum below; a sentence where they cannot be counted."""
    ranks = run.world_size
    try:
        config = run.pretraining
        if config is None or ranks is None:
            raise UserError("it needs config.yaml, and the number of ranks (machine.json).")
        counted = step_flops(config, RankBatchSizes.per_rank(config, ranks))
    except UserError as error:
        return [Paragraph(f"{label} has no table of FLOPs: {error}")]
    rows: list[list[Cell]] = [
        [part.name, part.objective, *(getattr(part, key) / 1e9 for key in PASSES)] for part in counted.components
    ]
    rows.append(["sum", "", *(counted.total(key) / 1e9 for key in PASSES)])
    caption = f"GFLOP of one step of one rank of {label} ({ranks} ranks)"
    return [ReportTable(caption, ["component", "objective", *PASSES], rows), Paragraph(CAPTION_SLOTS)]


def _predicted(run: RunRecord, predict: Callable[[Config, dict[str, Any], int], T]) -> T:
    """Raise UserError where the run's files do not allow a prediction."""
    config = run.pretraining
    if config is None or run.ds_config is None or run.world_size is None:
        raise UserError("it needs config.yaml, ds_config.json and the number of ranks (machine.json)")
    try:
        return predict(config, run.ds_config, run.world_size)
    except DAMAGED as error:
        raise UserError(f"ds_config.json is none that it can be predicted from ({error})") from None


def memory_tables(run: RunRecord, label: str) -> list[ReportBlock]:
    """The predicted memory of a rank at a step's worst moment, and the most that ranks held."""
    from profiling.cost.peak_memory import predict_peak

    machine = run.machine or {}
    attention = "matmul" if machine.get("attention") == "matmul" else "sdpa"
    device = "cpu" if machine.get("device", "cpu") == "cpu" else "cuda"
    blocks: list[ReportBlock] = []
    try:
        predicted = _predicted(run, partial(predict_peak, attention=attention, device=device))
        rows: list[list[Cell]] = [
            [each.name, each.bytes / 2**30, "on the host" if each.is_on_host else "" if each.is_static else "in a step"]
            for each in predicted.components
        ]
        rows.append(["predicted peak on the device", predicted.device_bytes / 2**30, ""])
        rows += _measured_peaks(run)
        note, measured = MEMORY_NOTE, run.last("memory/peak_max_gib")
        if device == "cpu":
            note += CPU_MEMORY_NOTE
        elif measured is not None:
            note += (
                f" The rank with the most took {measured / (predicted.device_bytes / 2**30):.2f} times the prediction."
            )
        blocks.append(ReportTable(f"GiB of one rank of {label}, predicted and measured", ["", "GiB", ""], rows))
        blocks.append(Paragraph(note))
    except UserError as error:
        blocks.append(Paragraph(f"{label} has no predicted memory: {error}"))
    if run.peak_gib is not None:
        peak = f"Peak memory of the first rank of {label}: {run.peak_gib:.2f} GiB, as logged at its end."
    else:
        peak = f"{label} has not logged its peak memory: a run does when it reaches its last step."
    return [*blocks, Paragraph(peak)]


def _measured_peaks(run: RunRecord) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for key, name in (("min", "least"), ("mean", "mean"), ("max", "most")):
        gib = run.last(f"memory/peak_{key}_gib")
        if gib is not None:
            rows.append([f"measured peak, {name} of all ranks", gib, ""])
    if rows and (rank := run.last("memory/peak_rank")) is not None:
        rows[-1][-1] = f"rank {rank:.0f}"
    return rows


def traffic_table(run: RunRecord, label: str) -> list[ReportBlock]:
    """MB a step and rank of each kind: predicted for a steady step, counted in the median report, and their ratio."""
    from profiling.cost.communication import by_kind, predict_collectives

    try:
        collectives = _predicted(run, predict_collectives)
    except UserError as error:
        return [Paragraph(f"{label} has no predicted bytes: {error}")]
    if not collectives:
        return [Paragraph(f"{label} has one rank, which sends nothing.")]
    predicted = by_kind(collectives)
    compared: list[list[Cell]] = []
    for kind in KINDS:
        megabytes, counted = predicted.get(kind, 0) / 1e6, run.median(f"comm/{kind}_mb")
        compared.append([kind, megabytes, counted, counted / megabytes if counted is not None and megabytes else None])
    world_size = run.world_size or 1
    rows: list[list[Cell]] = [
        [each.purpose, each.kind, each.message_bytes / 1e6, each.wire_bytes(world_size) / 1e6] for each in collectives
    ]
    columns = ["", "predicted", "counted", "counted / predicted"]
    return [
        ReportTable(f"MB a step of {label}, whole messages", columns, compared),
        ReportTable(f"Predicted collectives of {label}", ["", "kind", "message, MB", "sent by a rank, MB"], rows),
        Paragraph(TRAFFIC_NOTE),
    ]


# --- roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RooflinePoint:
    """One timed phase; its roof is that of the FLOPs a byte which the run has."""

    phase: str
    work: PhaseWork
    intensity: float
    ms: float
    roof: Roof

    @property
    def flops_per_second(self) -> float:
        """Reached FLOP/s."""
        return 1000 * self.work.flops / self.ms

    @property
    def fraction(self) -> float:
        """Reached FLOP/s over what the roof allows at this intensity; caches can bring it above 1."""
        return self.flops_per_second / self.roof.at(self.intensity)

    @property
    def bound(self) -> str:
        """Which of the two limits is nearer: memory, below the roof's ridge, or compute."""
        return "memory" if self.intensity < self.roof.ridge else "compute"

    def row(self) -> list[Cell]:
        """A row under SPEED_COLUMNS."""
        speed, roof = self.flops_per_second / 1e9, self.roof.at(self.intensity) / 1e9
        return [self.phase, self.intensity, self.ms, speed, roof, self.fraction, self.bound]


def rooflines(runs: list[RunRecord]) -> list[ReportBlock]:
    """A plot, a table and a sentence for each run; for two, how near each phase comes to its roof, side by side."""
    found = [_roofline(run, label) for run, label in labelled(runs)]
    blocks, fractions = [block for each, _ in found for block in each], [each for _, each in found]
    if len(runs) == 2 and all(fractions):
        names = dict.fromkeys(name for each in fractions for name in each)
        rows: dict[str, list[Cell]] = {name: [each.get(name) for each in fractions] for name in names}
        blocks.append(side_by_side("Share of its roof that each phase reaches", runs, rows))
    return [*blocks, Paragraph(ROOFLINE_NOTE)] if any(fractions) else blocks


def _roofline(run: RunRecord, label: str) -> tuple[list[ReportBlock], dict[str, float]]:
    try:
        roof, (phases, parts) = _roof(run), _work(run)
        points = _points(run, roof, phases)
    except UserError as missing:
        return [Paragraph(f"{label} has no roofline: {missing}")], {}
    fractions = {point.phase: point.fraction for point in points}
    return [*_roofline_blocks(run, label, points), _work_table(label, phases, parts)], fractions


def _roof(run: RunRecord) -> Roof:
    from profiling.cost.roofline import Roof

    machine = run.machine or {}
    peak, memory = (number(machine.get(key)) for key in ("flops_per_second", "bytes_per_second"))
    if not (peak and memory and peak > 0 and memory > 0):
        raise UserError("machine.json, which a run writes at its start, names no peak of the device and of its memory")
    return Roof(peak, memory)


def _work(run: RunRecord) -> tuple[dict[str, PhaseWork], dict[str, PhaseWork]]:
    """Work of the phases, and of the logits within them."""
    from profiling.cost.roofline import logits_work, phase_work, update_work

    config, ranks, ds_config = run.pretraining, run.world_size, run.ds_config
    if config is None or ranks is None or ds_config is None:
        raise UserError("it needs config.yaml, ds_config.json and the number of ranks (machine.json)")
    rows, saved = RankBatchSizes.per_rank(config, ranks), run.median("speed/caption_tokens_saved")
    slots = None if saved is None else (1 - saved) * rows.clip * config.model.text.context
    attention = "matmul" if (run.machine or {}).get("attention") == "matmul" else "sdpa"
    try:
        phases = phase_work(config, ranks, attention, slots) | update_work(config, ds_config, ranks)
    except DAMAGED as error:
        raise UserError(f"ds_config.json is none that the step can be counted by ({error})") from None
    return phases, logits_work(config, ranks, attention, slots)


def _points(run: RunRecord, roof: Roof, phases: dict[str, PhaseWork]) -> list[RooflinePoint]:
    """Every phase that is timed and computes something."""
    is_fused = bool((run.machine or {}).get("is_compiled"))
    points = [
        RooflinePoint(phase, work, work.intensity(is_fused), ms, roof)
        for phase, work in phases.items()
        if work.flops and (ms := run.median(f"phase/{phase}_ms"))
    ]
    if not points:
        raise UserError("it needs the times of its phases (phase/*), which system.phases=true takes")
    return points


def _roofline_blocks(run: RunRecord, label: str, points: list[RooflinePoint]) -> list[ReportBlock]:
    machine, roof = run.machine or {}, points[0].roof
    heaviest = "; ".join(
        f"{point.phase} at {100 * point.fraction:.0f} % of its roof, bound by {point.bound} "
        f"({point.intensity:.3g} FLOPs a byte)"
        for point in sorted(points, key=lambda point: -point.ms)[:3]
    )
    how = "as eager steps move"
    if machine.get("is_compiled"):
        how = "with all between two products fused, as compiled blocks nearly have it"
    return [
        Paragraph(
            f"One rank of {label} computes at most {_with_prefix(roof.flops_per_second)}FLOP/s "
            f"({machine.get('flops_source')}) and moves at most {_with_prefix(roof.bytes_per_second)}B/s "
            f"({machine.get('bytes_source')}): below {roof.ridge:.3g} FLOPs a byte memory is the limit."
        ),
        Paragraph(f"The phases that take longest: {heaviest}. FLOPs a byte are counted {how}."),
        RooflinePlot(
            f"Phases of {label} under its roof",
            roof.flops_per_second,
            roof.bytes_per_second,
            {point.phase: (point.intensity, point.flops_per_second) for point in points},
        ),
        ReportTable(f"What {label} reached", SPEED_COLUMNS, [point.row() for point in points]),
    ]


def _work_table(label: str, phases: dict[str, PhaseWork], parts: dict[str, PhaseWork]) -> ReportTable:
    """All phases that compute; below them logits, which are in objectives, and in backward again."""
    named = phases | {f"{part}, in all phases": work for part, work in parts.items()}
    rows: list[list[Cell]] = [
        [
            name,
            work.flops / 1e9,
            work.bytes / 1e6,
            work.intensity(False),
            work.product_bytes / 1e6,
            work.intensity(True),
        ]
        for name, work in named.items()
        if work.flops
    ]
    return ReportTable(f"Work in one step of one rank of {label}", WORK_COLUMNS, rows)


def _with_prefix(rate: float) -> str:
    """1.4e10 -> "14 G", for the unit that follows."""
    return f"{rate / 1e12:.4g} T" if rate >= 1e12 else f"{rate / 1e9:.4g} G"
