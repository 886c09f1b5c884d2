"""FLOPs and bytes of each phase of a step, and the most that a machine can do with them: the axes of a roofline.

    work = phase_work(config, world_size=2, attention="sdpa", caption_slots=14_336)
    work["trunk"]                          # PhaseWork(flops=1.2e10, product_bytes=2.2e8, bytes=8.2e8)
    logits_work(config, 2, "sdpa")         # {"contrastive logits": PhaseWork(...), "prototype logits": PhaseWork(...)}
    update_work(config, ds_config, 2)      # {"optimizer": PhaseWork(...), "ema": PhaseWork(...)}
    roof = Roof(flops_per_second=1.0e11, bytes_per_second=1.4e10)
    roof.at(0.57)                          # 8.0e9: FLOP/s that nothing with so few FLOPs a byte can exceed

    flops           of matrix products and convolutions, by formula (profiling/cost/step_flops.py)
    product_bytes   operands and results of these products, each once: what is left if all between them is fused
    bytes           operands and results of every operator that is no view: what eager steps ask of caches and memory

Bytes are those of a traced step (profiling/cost/step_trace.py), of one rank, without collectives and ZeRO's copies.
Losses are counted as they run on a CPU. With objectives.rec.mask it is the mean over the steps of a run. The optimizer
and the EMA are counted by hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from configs import Config
from configs.deepspeed import offloads_optimizer, zero_stage
from model.describe import step_layouts
from model.packing import RankBatchSizes
from model.text import pack_captions, packed_row_width
from profiling.cost.communication import DTYPE_BYTES, FP32_BYTES, meta_model
from profiling.cost.flops import StepFlops
from profiling.cost.operator_trace import LOGITS
from profiling.cost.step_flops import flops_by_phase, logits_flops, step_flops
from profiling.cost.step_trace import meta_batch, trace_step

ADAMW_FLOPS = 15  # a weight: decay, two averages, their corrections, root, quotient, sum
EMA_FLOPS = 3


@dataclass(frozen=True)
class PhaseWork:
    """FLOPs and bytes of one phase of a step, on one rank."""

    flops: float = 0
    product_bytes: float = 0
    bytes: float = 0

    def intensity(self, is_fused: bool) -> float:
        """FLOPs a byte moved: with all fused between the products, or with nothing fused."""
        moved = self.product_bytes if is_fused else self.bytes
        return self.flops / moved if moved else math.inf


@dataclass(frozen=True)
class Roof:
    """The most a machine does: its peak FLOP/s, or what its memory can feed."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on compute, not memory, is the limit."""
        return self.flops_per_second / self.bytes_per_second

    def at(self, intensity: float) -> float:
        """FLOP/s at so many FLOPs a byte."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def seconds(self, work: PhaseWork, is_fused: bool) -> float:
        """The least time that the work can take."""
        moved = work.product_bytes if is_fused else work.bytes
        return max(work.flops / self.flops_per_second, moved / self.bytes_per_second)


def phase_work(
    config: Config, world_size: int, attention: str, caption_slots: float | None = None
) -> dict[str, PhaseWork]:
    """Work of each phase that a run times; "backward" is that of all modules, recomputation included.

    `attention`: "matmul", or "sdpa" for every fused backend. `caption_slots`: those that packed captions take on a rank
    (default: as many as their contexts have).
    """
    captions = _captions(config, RankBatchSizes.per_rank(config, world_size), caption_slots)
    flops = flops_by_phase(_flops(config, world_size, attention, captions))
    moved = _moved_bytes(config, world_size, attention, caption_slots)[0]
    return {phase: PhaseWork(flops.get(phase, 0), *each) for phase, each in moved.items()}


def logits_work(
    config: Config, world_size: int, attention: str, caption_slots: float | None = None
) -> dict[str, PhaseWork]:
    """Work, over all phases, of the logits that losses compute without keeping a matrix: a part of the phases."""
    captions = _captions(config, RankBatchSizes.per_rank(config, world_size), caption_slots)
    flops = logits_flops(_flops(config, world_size, attention, captions))
    moved = _moved_bytes(config, world_size, attention, caption_slots)[1]
    return {name: PhaseWork(flops.get(name, 0), *each) for name, each in moved.items()}


def _flops(config: Config, world_size: int, attention: str, captions: Tensor) -> StepFlops:
    rows = RankBatchSizes.per_rank(config, world_size)
    slots = pack_captions(captions[: rows.clip_per_micro_batch]).tokens_RC.numel() * rows.micro_batches
    return step_flops(config, rows, slots, backend=attention)


@cache
def _moved_bytes(
    config: Config, world_size: int, attention: str, caption_slots: float | None
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """(bytes of products, all bytes) by phase, and by the loss whose code ran the operator."""
    rows = RankBatchSizes.per_rank(config, world_size)
    batch = meta_batch(config, rows, _captions(config, rows, caption_slots))
    by_phase, by_source = (defaultdict[str, list[float]](lambda: [0.0, 0.0]) for _ in range(2))
    for num_unseen, (_, fraction) in step_layouts(config, rows).items():
        events = trace_step(config, world_size, attention, batch=batch, num_unseen=num_unseen, with_traffic=True)
        for event in (event for event in events if event.moved):
            sums = [by_phase[event.phase]] + ([] if event.source is None else [by_source[event.source]])
            for each in sums:
                each[0] += fraction * event.product
                each[1] += fraction * event.moved
    sources = (name for name in dict.fromkeys(LOGITS.values()) if name in by_source)
    return {name: (a, b) for name, (a, b) in by_phase.items()}, {
        name: (by_source[name][0], by_source[name][1]) for name in sources
    }


def _captions(config: Config, rows: RankBatchSizes, slots: float | None) -> Tensor:
    """Captions of one rank, of such lengths that they fill as many rows as a run's captions that take `slots`."""
    context, count = config.model.text.context, rows.clip_per_micro_batch
    width = packed_row_width(context)
    wanted = count if slots is None else min(count, max(1, round(slots / rows.micro_batches / width)))
    each, more = divmod(count, wanted) if wanted else (0, 0)
    lengths = [width // (each + 1)] * ((each + 1) * more) + [width // max(each, 1)] * (each * (wanted - more))
    captions = torch.zeros(count, context, dtype=torch.int64)
    for caption, length in enumerate(lengths):
        captions[caption, min(length, context) - 1] = config.model.text.vocab - 1
    return captions.repeat(rows.micro_batches, 1)


def update_work(config: Config, ds_config: dict[str, Any], world_size: int) -> dict[str, PhaseWork]:
    """Work of "optimizer" and "ema" on this rank's shards, each number read and written once a step.

    AdamW reads weight, gradient and two moments and writes all but the gradient, in float32, and the weight once more
    in the run's precision; it is left out where the host steps. The EMA reads student and average, writes the average
    and the teacher's weight; the average of all trained weights (`ema`) has no such weight. They have no products:
    counted are 15 and 3 operations a weight.
    """
    size, model = DTYPE_BYTES[config.optim.precision], meta_model(config, world_size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / world_size
    all_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen = all_frozen / world_size if zero_stage(ds_config) == 3 else all_frozen
    work = {}
    if not offloads_optimizer(ds_config):
        moved = trained * (7 * FP32_BYTES + size)
        work["optimizer"] = PhaseWork(ADAMW_FLOPS * trained, moved, moved)
    averaged = trained if config.ema is not None and not offloads_optimizer(ds_config) else 0
    if frozen or averaged:
        moved = frozen * (3 * FP32_BYTES + size) + averaged * 3 * FP32_BYTES
        work["ema"] = PhaseWork(EMA_FLOPS * (frozen + averaged), moved, moved)
    return work
