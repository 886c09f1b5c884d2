"""The report's roofline: every timed part of a step under what its machine can compute and move at most.

rooflines([run])            # a plot, a table and a sentence that reads them; or what is missing for it
"""

from __future__ import annotations

from dataclasses import dataclass

from configs import UserError
from model.rows import Rows
from profiling.report.blocks import Block, Cell, Roofline, Sentence, Table
from profiling.report.data import Run, number
from profiling.report.figures import labels, side_by_side
from profiling.step.roofline import Roof, Work

COUNTED = (
    "FLOPs are those of products, as in the table of FLOPs; AdamW counts with 15 operations a weight, the EMA with 3. "
    "MB moved: what the operands and results of every operator of an eager step hold, views left out. MB of products: "
    "what would be left of it if all between two products were fused into them. Both are one rank's, counted on the "
    "run's model and batch, as operators of the CPU. Milliseconds are medians over reports of means over ranks. "
    "Collectives, the loader and ZeRO's own copies move bytes too, and are not counted. More than the whole roof means "
    "that caches served what is counted as moved, or that the peaks were measured in a slower moment."
)
WORK = ["phase", "GFLOP", "MB moved", "FLOP/byte", "MB of products", "FLOP/byte of products"]
SPEED = ["phase", "FLOP/byte", "ms", "GFLOP/s", "roof, GFLOP/s", "of the roof", "bound by"]
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Point:
    """One timed part of a step; its roof is that of the FLOPs a byte which the run has."""

    phase: str
    work: Work
    intensity: float
    ms: float
    roof: Roof

    @property
    def flops_per_second(self) -> float:
        """What was reached."""
        return 1000 * self.work.flops / self.ms

    @property
    def share(self) -> float:
        """What was reached, of what the roof allows at this intensity; caches can bring it above 1."""
        return self.flops_per_second / self.roof.at(self.intensity)

    @property
    def bound(self) -> str:
        """Which of the two limits is nearer here: memory, below the roof's ridge, or compute."""
        return "memory" if self.intensity < self.roof.ridge else "compute"

    def reached(self) -> list[Cell]:
        """A row under SPEED."""
        speed, roof = self.flops_per_second / 1e9, self.roof.at(self.intensity) / 1e9
        return [self.phase, self.intensity, self.ms, speed, roof, self.share, self.bound]


def rooflines(runs: list[Run]) -> list[Block]:
    """A plot, a table and a sentence a run; for two, how near each part comes to its roof, side by side."""
    found = [_of_run(run, label) for run, label in zip(runs, labels(runs), strict=True)]
    blocks, shares = [block for each, _ in found for block in each], [each for _, each in found]
    if len(runs) == 2 and all(shares):
        names = dict.fromkeys(name for each in shares for name in each)
        rows: dict[str, list[Cell]] = {name: [each.get(name) for each in shares] for name in names}
        blocks.append(side_by_side("Share of its roof that each phase reaches", runs, rows))
    return [*blocks, Sentence(COUNTED)] if any(shares) else blocks


def _of_run(run: Run, label: str) -> tuple[list[Block], dict[str, float]]:
    try:
        roof, (phases, parts) = _roof(run), _work(run)
        points = _points(run, roof, phases)
    except UserError as missing:
        return [Sentence(f"{label} has no roofline: {missing}")], {}
    shares = {point.phase: point.share for point in points}
    return [*_drawn(run, label, points), _counts(label, phases, parts)], shares


def _points(run: Run, roof: Roof, phases: dict[str, Work]) -> list[Point]:
    """Every phase that is timed and computes something."""
    is_fused = bool((run.machine or {}).get("is_compiled"))
    times = {phase: run.median(f"phase/{phase}_ms") for phase in phases}
    points = [
        Point(phase, work, work.intensity(is_fused), ms, roof)
        for phase, work in phases.items()
        if work.flops and (ms := times[phase])
    ]
    if not points:
        raise UserError("it needs the times of its phases (phase/*), which system.phases=true takes")
    return points


def _roof(run: Run) -> Roof:
    machine = run.machine or {}
    peak, memory = (number(machine.get(key)) for key in ("flops_per_second", "bytes_per_second"))
    if not (peak and memory and peak > 0 and memory > 0):
        raise UserError("machine.json, which a run writes at its start, names no peak of the device and of its memory")
    return Roof(peak, memory)


def _work(run: Run) -> tuple[dict[str, Work], dict[str, Work]]:
    """Of the phases, and of the logits within them."""
    from profiling.step.phase_work import logits_work, phase_work, update_work  # imports DeepSpeed, which talks

    config, ranks, ds_config = run.pretraining, run.world_size, run.ds_config
    if config is None or ranks is None or ds_config is None:
        raise UserError("it needs config.yaml, ds_config.json and the number of ranks (machine.json)")
    rows, saved = Rows.per_rank(config, ranks), run.median("speed/caption_tokens_saved")
    slots = None if saved is None else (1 - saved) * rows.clip * config.model.text.context
    attention = "matmul" if (run.machine or {}).get("attention") == "matmul" else "sdpa"
    try:
        phases = phase_work(config, rows, ranks, attention, slots) | update_work(config, ds_config, ranks)
    except _DAMAGED as error:
        raise UserError(f"ds_config.json is none that the step can be counted by ({error})") from None
    return phases, logits_work(config, rows, ranks, attention, slots)


def _drawn(run: Run, label: str, points: list[Point]) -> list[Block]:
    machine, roof = run.machine or {}, points[0].roof
    plotted = {point.phase: (point.intensity, point.flops_per_second) for point in points}
    return [
        Sentence(
            f"One rank of {label} computes at most {_in_thousands(roof.flops_per_second)}FLOP/s "
            f"({machine.get('flops_source')}) and moves at most {_in_thousands(roof.bytes_per_second)}B/s "
            f"({machine.get('bytes_source')}): below {roof.ridge:.3g} FLOPs a byte memory is the limit."
        ),
        Sentence(_read(points, is_fused=bool(machine.get("is_compiled")))),
        Roofline(f"Phases of {label} under its roof", roof.flops_per_second, roof.bytes_per_second, plotted),
        Table(f"What {label} reached", SPEED, [point.reached() for point in points]),
    ]


def _counts(label: str, phases: dict[str, Work], parts: dict[str, Work]) -> Table:
    """All phases that compute; below them parts, which are in objectives, and in backward again."""
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
    return Table(f"Work in one step of one rank of {label}", WORK, rows)


def _read(points: list[Point], is_fused: bool) -> str:
    """The heaviest phases in words."""
    heaviest = sorted(points, key=lambda point: -point.ms)[:3]
    said = "; ".join(
        f"{point.phase} at {100 * point.share:.0f} % of its roof, bound by {point.bound} "
        f"({point.intensity:.3g} FLOPs a byte)"
        for point in heaviest
    )
    how = (
        "with all between two products fused, as compiled blocks nearly have it" if is_fused else "as eager steps move"
    )
    return f"The phases that take longest: {said}. FLOPs a byte are counted {how}."


def _in_thousands(rate: float) -> str:
    """1.4e10 -> "14 G", for the unit that follows."""
    return f"{rate / 1e12:.4g} T" if rate >= 1e12 else f"{rate / 1e9:.4g} G"
