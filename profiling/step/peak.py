"""The peak of a training step on one rank, as one number: states, and what a step adds at its worst moment.

    footprint = predict_peak(config, ds_config, world_size=8)
    footprint.device_bytes                 # the peak
    print(footprint.table())               # ... and what it is made of, at that moment

A step has three moments in which it may need the most (deepspeed 0.19.8):

    computing    activations and what backward takes beside them (profiling/step/memory_trace.py), gathered parameters,
                 and the buckets in which gradients wait for their reduction
    reducing     the last bucket, when backward is over; with micro-batches, and under ZeRO-1 without overlap_comm, all
                 gradients were kept until here
    stepping     the gradient's norm (on the CPU in float64, a tensor at a time); then a group's gradients in float32

How ZeRO treats a gradient: one bucket of reduce_bucket_size elements (ZeRO-3; it is there between steps too) or two of
them (ZeRO-1 and 2 with overlap_comm; they come with the first gradient of a step) take it in, and a full one is copied
once more to be reduced. ZeRO-1 and 2 then keep the rank's own part of them apart.

tests/profiling/test_step_peak.py and `python -m profiling.bench step_memory` hold this against what real engines take.
Measured are tensors; a GPU's allocator reserves more than it gives out, and libraries have workspaces of their own. Not
modelled: the buffer into which ZeRO-3 gathers several parameters at once, up to stage3_prefetch_bucket_size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from configs import Config
from configs.ds import zero_stage
from data.batch import Batch
from profiling.step.communication import (
    ALIGN,
    BUCKET,
    COMM_DTYPE_BYTES,
    DTYPE_BYTES,
    FP32_BYTES,
    keeps_gradients,
    meta_model,
    optimizer_groups,
)
from profiling.step.footprint import GATHERED, SECOND, Component, Footprint, predict
from profiling.step.live_bytes import Event
from profiling.step.memory_trace import GRADIENTS, HEADS, OBJECTIVES, TOWERS, step_events

NORM_BYTES = 8  # gradients are squared in float64
PREFIX, ACTIVATIONS = "activations: ", (*TOWERS, HEADS, OBJECTIVES)
SUB_GROUP = 1_000_000_000  # elements of a rank's share that ZeRO-3 steps at once, DeepSpeed's default


def predict_peak(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    attention: str = "sdpa",
    device: str = "cpu",
    batch: Batch | None = None,
) -> Footprint:
    """One rank's states and what is added to them at the step's worst moment; `device_bytes` is the peak.

    `attention` is "sdpa", for every fused backend, or "matmul", which keeps its scores. `batch` is a rank's own, to
    predict for these captions; else one with captions of the web's length is made up.
    """
    predicted = predict(config, ds_config, world_size)
    states = [each for each in predicted.components if each.is_static]
    gathered = {each.name: each.bytes for each in predicted.components if each.name in (GATHERED, SECOND)}
    zero = _Zero.of(config, ds_config, world_size)
    events = step_events(config, world_size, attention, device, zero.stage == 3, batch, keeps=zero.keeps)
    moments = [_computing(events, zero, gathered), _reducing(events, zero), _stepping(events, zero)]
    worst = max(moments, key=lambda moment: moment.total())
    found = [Component(name, size, is_static=False) for name, size in worst.items() if size]
    return Footprint((*states, *found))


@dataclass(frozen=True)
class _Zero:
    """What ZeRO does with gradients on one rank, in elements and bytes."""

    stage: int
    each: int  # bytes of a number
    sent: int  # bytes of a number on the wire
    bucket: int
    buffers: int  # that come with the first gradient of a step
    own: int  # elements of the parameters of which this rank steps a part
    group: int  # elements of the largest group it steps at once
    largest: int  # elements of its largest gradient
    keeps: bool  # all gradients, to the end

    @classmethod
    def of(cls, config: Config, ds_config: dict[str, Any], world_size: int) -> _Zero:
        zero, model, stage = ds_config["zero_optimization"], meta_model(config, world_size), zero_stage(ds_config)
        each = DTYPE_BYTES[config.optim.precision]
        given = ds_config.get("communication_data_type")
        groups = [[p.numel() for p in group["params"]] for group in optimizer_groups(config, model)]
        if stage == 3:
            shards = [[-(-size // world_size) for size in group] for group in groups]
            own, largest, buffers = 0, max(max(shard) for shard in shards), 0
            group = min(max(sum(shard) for shard in shards), int(zero.get("sub_group_size", SUB_GROUP)) + largest)
        else:
            own = max(sum(parts) for parts in zip(*(_owned(group, world_size) for group in groups), strict=True))
            group = max(_partition(group, world_size) for group in groups)
            largest = max(max(group) for group in groups)
            buffers = 2 if zero.get("overlap_comm", False) else 1
        # A lone rank's bucket is not sent (engine/zero/streams.py), unless it is rounded on the way.
        stays = world_size == 1 and buffers == 1 and given in (None, config.optim.precision)
        return cls(
            stage=stage,
            each=each,
            sent=0 if stays else each if given is None else COMM_DTYPE_BYTES[given],
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            buffers=buffers,
            own=own,
            group=group,
            largest=largest,
            keeps=keeps_gradients(config, ds_config),
        )


@dataclass
class _Buckets:
    """Gradients on their way out."""

    zero: _Zero
    filled: int = 0  # elements
    loose: int = 0  # elements of a gradient larger than the bucket, which waits outside
    has_begun: bool = False
    has_reduced: bool = False

    def take(self, elements: int) -> int:
        """One more gradient. Gives the bytes that are held on top while it enters."""
        copied = self.reduce() if self.filled and self.filled + elements > self.zero.bucket else 0
        self.has_begun, self.filled = True, self.filled + elements
        self.loose = elements if elements > self.zero.bucket else 0
        return copied

    def reduce(self) -> int:
        """Empties the bucket. Gives the bytes of the copy that is sent."""
        copied, self.filled, self.loose, self.has_reduced = self.filled * self.zero.sent, 0, 0, True
        return copied

    @property
    def bucket_bytes(self) -> int:
        buffers = self.zero.buffers * self.zero.bucket if self.has_begun else 0
        return (buffers + self.loose) * self.zero.each

    @property
    def own_bytes(self) -> int:
        return self.zero.own * self.zero.each if self.has_reduced else 0


def _computing(events: tuple[Event, ...], zero: _Zero, gathered: dict[str, int]) -> Counter[str]:
    """Forward, objectives and backward."""
    buckets, live = _Buckets(zero), 0
    best, place, worst = -1, 0, Counter[str]()
    for at, event in enumerate(events):
        live += event.delta
        copied = buckets.take(event.gradient) if event.gradient else 0
        total = live + buckets.bucket_bytes + buckets.own_bytes + copied
        if total > best:
            best, place = total, at
            worst = Counter(
                {"reduce buckets in use": buckets.bucket_bytes + copied, "own gradients": buckets.own_bytes}
            )
    return _held(events[: place + 1]) + worst + Counter(gathered)


def _reducing(events: tuple[Event, ...], zero: _Zero) -> Counter[str]:
    """The end of backward."""
    buckets = _Buckets(zero)
    for event in events:
        if event.gradient:
            buckets.take(event.gradient)
    if zero.keeps:
        buckets.take(min(zero.own if zero.stage < 3 else zero.bucket, zero.bucket))
    copied = buckets.reduce()
    in_use = Counter({"reduce buckets in use": buckets.bucket_bytes + copied, "own gradients": buckets.own_bytes})
    return _held(events) + in_use


def _stepping(events: tuple[Event, ...], zero: _Zero) -> Counter[str]:
    """The optimizer; outputs of the step are still there, gradients are the rank's own alone."""
    as_float32 = FP32_BYTES + (zero.each if zero.each != FP32_BYTES else 0)
    found = _held(event for event in events if event.label != GRADIENTS)
    found["own gradients"] = zero.own * zero.each
    found["gradients as the optimizer takes them"] = max(NORM_BYTES * zero.largest, as_float32 * zero.group)
    return found


def _held(events: Iterable[Event]) -> Counter[str]:
    """Bytes alive after these events, by who made them."""
    found = Counter[str]()
    for event in events:
        found[f"{PREFIX}{event.label}" if event.label in ACTIVATIONS else event.label] += event.delta
    return found


def _partition(sizes: list[int], world_size: int) -> int:
    """Elements of a group that ZeRO-1 and 2 give to each rank."""
    unit = ALIGN * world_size
    return -(-sum(sizes) // unit) * unit // world_size


def _owned(sizes: list[int], world_size: int) -> list[int]:
    """For every rank, the elements of the parameters that its part of a flattened group touches."""
    part, found, begins = _partition(sizes, world_size), [0] * world_size, accumulate(sizes, initial=0)
    for size, begin in zip(sizes, begins, strict=False):
        for rank in range(begin // part, min(-(-(begin + size) // part), world_size)):
            found[rank] += size
    return found
