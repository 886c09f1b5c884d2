"""Predict the memory of a rank from config and DeepSpeed JSON: states, the peak of a step, and settings that lower it.

    footprint = predict_peak(config, ds_config, world_size=8)
    footprint.device_bytes                                    # the peak
    print(footprint.table())                                  # ... and its parts at that moment
    for saving in savings(config, ds_config, world_size=8):   # the largest first
        print(saving)        # "system.activation_checkpointing=full: -31.2 GiB, to 18.4; blocks run forward twice"

States between two steps, those of deepspeed 0.19.8, for N trained and F frozen parameters of b bytes on W ranks:

    component              ZeRO-1, 2                       ZeRO-3
    parameters             N b                             N b / W, and small ones whole
    frozen teacher         F b                             F b / W
    optimizer              12 N / W                        12 N / W          float32 weights and two moments
    EMA teacher            4 F                             4 F / W           float32 averages
    average of weights     4 N / W                         4 N / W           with ema
    gradients              -                               N b / W
    reduce bucket          -                               reduce_bucket_size b, whatever the model's size
    perceptual network     59 MB                           59 MB             with objectives.rec.perceptual
    frozen encoder         its own, whole                  its own, whole    with objectives.rec.align
while a step runs
    gathered parameters    -                               the most that is whole at once (zero3_gathers.py)
    second copies          -                               (N + F) b / zero_hpz_partition_size
    kept gradients         N b                             N b               with system.clip.micro_batches > 1, and
                                                                             under ZeRO-1 without overlap_comm
A lone rank gathers nothing: its shard is the parameter. A step needs the most memory at one of three moments:

    computing    activations and what backward adds (step_trace.py), gathered parameters, and the buckets in which
                 gradients wait for their reduction
    reducing     the last bucket, when backward is over; kept gradients are still there
    stepping     the gradient norm (on the CPU in float64, a tensor at a time); then a group's gradients in float32

Gradients enter one bucket of reduce_bucket_size elements (ZeRO-3; it exists between steps too) or two (ZeRO-1 and 2
with overlap_comm; they come with the first gradient of a step); a full one is copied once more to be reduced. ZeRO-1
and 2 then keep the rank's own part apart.

Tests and `python -m profiling.bench step_memory` compare this with tensors of real engines. An allocator reserves more
than it gives out, and libraries have workspaces of their own. Not modelled: the buffer into which ZeRO-3 gathers
several parameters at once, up to stage3_prefetch_bucket_size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from pydantic import ValidationError

from configs import Config, UserError
from configs.deepspeed import HPZ_SIZE, is_enabled, offloads_optimizer, zero_stage
from configs.model import Text, Vit
from data.batch import Batch
from model.pretrainer import Pretrainer
from profiling.cost.block_traffic import kept_bytes
from profiling.cost.communication import (
    ALIGN,
    BUCKET,
    COMM_DTYPE_BYTES,
    DTYPE_BYTES,
    FP32_BYTES,
    keeps_gradients,
    meta_model,
    optimizer_groups,
)
from profiling.cost.flops import perceptual_parameters
from profiling.cost.operator_trace import OTHER, TraceEvent
from profiling.cost.step_trace import GRADIENTS, OBJECTIVES, TOWERS, frozen_encoder, trace_step
from profiling.cost.zero3_gathers import GatherSettings, steady_gathers

OPTIMIZER_BYTES = 3 * FP32_BYTES  # weights and two moments
GATHERED, SECOND = "gathered parameters", "second copies"
NORM_BYTES = 8  # gradients are squared in float64
HEADS, PREFIX = "heads", "activations: "
SUB_GROUP = 1_000_000_000  # elements of a rank's shard that ZeRO-3 steps at once, DeepSpeed's default
MIN_SAVING = 0.01  # of the peak: less is no advice
SMALL_BUCKET = 50_000_000  # elements; below it reductions become too many
MICRO_BATCHES = (2, 4, 8)


@dataclass(frozen=True)
class MemoryComponent:
    """Bytes on one rank. `is_static`: held between steps too; `is_on_host`: in the host's memory, not the device's."""

    name: str
    bytes: int
    is_static: bool = True
    is_on_host: bool = False


@dataclass(frozen=True)
class MemoryFootprint:
    """All memory components of one rank."""

    components: tuple[MemoryComponent, ...]

    @property
    def static_bytes(self) -> int:
        """Held on the device between two steps."""
        return sum(each.bytes for each in self.components if each.is_static and not each.is_on_host)

    @property
    def device_bytes(self) -> int:
        """Held on the device when all components are."""
        return sum(each.bytes for each in self.components if not each.is_on_host)

    def table(self) -> str:
        """Text table, in GiB."""
        lines = [f"{'component':<24}{'GiB':>10}"]
        for each in self.components:
            where = " on the host" if each.is_on_host else "" if each.is_static else " while a step runs"
            lines.append(f"{each.name:<24}{each.bytes / 2**30:>10.3f}{where}")
        return "\n".join([*lines, f"{'sum on the device':<24}{self.device_bytes / 2**30:>10.3f}"])

    def as_compiled(self, config: Config) -> MemoryFootprint:
        """The footprint of compiled blocks without checkpointing, which keep less than the traced eager ones."""
        parts: dict[str, Vit | Text] = {
            "activations: trunk": config.model.trunk,
            "activations: decoder": config.model.decoder,
            "activations: text": config.model.text,
        }
        kept = {
            name: kept_bytes(part, config.optim.precision, True) / kept_bytes(part, config.optim.precision, False)
            for name, part in parts.items()
        }
        scaled = (replace(each, bytes=round(each.bytes * kept.get(each.name, 1))) for each in self.components)
        return MemoryFootprint(tuple(scaled))


def largest_parts(footprint: MemoryFootprint, count: int = 4) -> str:
    """The largest components on the device: "activations: trunk 61.2, optimizer 12.1, ...", in GiB."""
    parts = sorted((part for part in footprint.components if not part.is_on_host), key=lambda part: -part.bytes)
    return ", ".join(f"{part.name} {_gib(part.bytes)}" for part in parts[:count])


# --- states -----------------------------------------------------------------------------------------------------------


def predict_states(config: Config, ds_config: dict[str, Any], world_size: int) -> MemoryFootprint:
    """One rank's states, and what ZeRO gathers or keeps while a step runs. Activations are not in it."""
    model = meta_model(config, world_size)
    states = _zero3_states if zero_stage(ds_config) == 3 else _zero12_states
    found = states(config, ds_config, model, world_size)
    if keeps_gradients(config, ds_config):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.append(MemoryComponent("kept gradients", trained * DTYPE_BYTES[config.optim.precision], is_static=False))
    if config.objectives.rec.weight and config.objectives.rec.perceptual:
        found.append(MemoryComponent("perceptual network", perceptual_parameters() * FP32_BYTES))
    with torch.device("meta"):
        encoder = frozen_encoder(config, "sdpa")
    frozen = 0 if encoder is None else sum(parameter.numel() for parameter in encoder.parameters())
    found.append(MemoryComponent("frozen encoder", frozen * DTYPE_BYTES[config.optim.precision]))
    return MemoryFootprint(tuple(each for each in found if each.bytes))


def _zero3_states(
    config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int
) -> list[MemoryComponent]:
    each, zero = DTYPE_BYTES[config.optim.precision], ds_config["zero_optimization"]
    shards = {name: -(-p.numel() // world_size) for name, p in model.named_parameters()}
    trained = sum(shards[name] for name, p in model.named_parameters() if p.requires_grad)
    frozen = sum(shards.values()) - trained
    threshold = GatherSettings.of(ds_config).persistence
    small = [name for name, p in model.named_parameters() if p.numel() <= threshold]
    whole = sum(shards[name] for name in small if not name.startswith("teacher.")) * world_size
    gathered = max(0, steady_gathers(config, ds_config, model).max_live - whole)
    if world_size == 1:  # a lone rank's shard is the parameter: gathering copies nothing
        whole = gathered = 0
    freed = sum(p.numel() for p in model.parameters()) - sum(shards[name] for name in small) * world_size
    second = freed // zero[HPZ_SIZE] if is_enabled(zero, HPZ_SIZE) else 0
    return [
        MemoryComponent("parameters", (trained + whole) * each),
        MemoryComponent("frozen teacher", frozen * each),
        MemoryComponent("optimizer", trained * OPTIMIZER_BYTES, is_on_host=offloads_optimizer(ds_config)),
        MemoryComponent("EMA teacher", frozen * FP32_BYTES),
        _average(config, ds_config, trained),
        MemoryComponent("gradients", trained * each),
        MemoryComponent("reduce bucket", int(zero.get("reduce_bucket_size", BUCKET)) * each),
        MemoryComponent(GATHERED, gathered * each, is_static=False),
        MemoryComponent(SECOND, max(0, second) * each, is_static=False),
    ]


def _zero12_states(
    config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int
) -> list[MemoryComponent]:
    each = DTYPE_BYTES[config.optim.precision]
    groups = [[p.numel() for p in group["params"]] for group in optimizer_groups(config, model)]
    own = sum(_partition(group, world_size) for group in groups)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return [
        MemoryComponent("parameters", own * world_size * each),
        MemoryComponent("frozen teacher", frozen * each),
        MemoryComponent("optimizer", own * OPTIMIZER_BYTES, is_on_host=offloads_optimizer(ds_config)),
        MemoryComponent("EMA teacher", frozen * FP32_BYTES),
        _average(config, ds_config, own),
    ]


def _average(config: Config, ds_config: dict[str, Any], own: int) -> MemoryComponent:
    """The average of weights, where the optimizer has its weights; empty without `ema`."""
    size = 0 if config.ema is None else own * FP32_BYTES
    return MemoryComponent("average of weights", size, is_on_host=offloads_optimizer(ds_config))


def _partition(sizes: list[int], world_size: int) -> int:
    """Elements of a flattened group that ZeRO-1 and 2 give to each rank."""
    unit = ALIGN * world_size
    return -(-sum(sizes) // unit) * unit // world_size


# --- the peak of a step -----------------------------------------------------------------------------------------------


def predict_peak(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    attention: str = "sdpa",
    device: str = "cpu",
    batch: Batch | None = None,
) -> MemoryFootprint:
    """One rank's states and what is added at the step's worst moment; `device_bytes` is the peak.

    `attention`: "sdpa", for every fused backend, or "matmul", which keeps its scores. `batch`: the rank's own, to
    predict for its captions (default: captions as long as the web's).
    """
    predicted = predict_states(config, ds_config, world_size)
    states = [each for each in predicted.components if each.is_static]
    gathered = {each.name: each.bytes for each in predicted.components if each.name in (GATHERED, SECOND)}
    zero = _GradientReduction.of(config, ds_config, world_size)
    events = trace_step(
        config, world_size, attention, device, zero.stage == 3, batch, keeps_gradients=zero.keeps_gradients
    )
    moments = [_computing(events, zero, gathered), _reducing(events, zero), _stepping(events, zero)]
    worst = max(moments, key=lambda moment: moment.total())
    added = [MemoryComponent(name, size, is_static=False) for name, size in worst.items() if size]
    return MemoryFootprint((*states, *added))


@dataclass(frozen=True)
class _GradientReduction:
    """How ZeRO reduces gradients on one rank, in elements and bytes."""

    stage: int
    each: int  # bytes of an element
    sent: int  # bytes of an element on the wire
    bucket: int
    buffers: int  # that come with the first gradient of a step
    own: int  # elements of the parameters of which this rank steps a part
    group: int  # elements of the largest group it steps at once
    largest: int  # elements of its largest gradient
    keeps_gradients: bool  # all of them, to the end of backward

    @classmethod
    def of(cls, config: Config, ds_config: dict[str, Any], world_size: int) -> _GradientReduction:
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
        sent = 0 if stays else each if given is None else COMM_DTYPE_BYTES[given]
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        return cls(stage, each, sent, bucket, buffers, own, group, largest, keeps_gradients(config, ds_config))


@dataclass
class _GradientBuckets:
    """Buckets in which gradients wait for their reduction."""

    zero: _GradientReduction
    filled: int = 0  # elements
    loose: int = 0  # elements of a gradient larger than the bucket, which waits outside
    has_begun: bool = False
    has_reduced: bool = False

    def add(self, elements: int) -> int:
        """Add a gradient; return the bytes that are held on top while it enters."""
        copied = self.reduce() if self.filled and self.filled + elements > self.zero.bucket else 0
        self.has_begun, self.filled = True, self.filled + elements
        self.loose = elements if elements > self.zero.bucket else 0
        return copied

    def reduce(self) -> int:
        """Empty the bucket; return the bytes of the copy that is sent."""
        copied, self.filled, self.loose, self.has_reduced = self.filled * self.zero.sent, 0, 0, True
        return copied

    def held(self, copied: int) -> Counter[str]:
        """Bytes by name, with `copied` on top."""
        buffers = self.zero.buffers * self.zero.bucket if self.has_begun else 0
        in_use = (buffers + self.loose) * self.zero.each + copied
        own = self.zero.own * self.zero.each if self.has_reduced else 0
        return Counter({"reduce buckets in use": in_use, "own gradients": own})


def _computing(events: tuple[TraceEvent, ...], zero: _GradientReduction, gathered: dict[str, int]) -> Counter[str]:
    """The worst moment of forward, losses and backward."""
    buckets, live = _GradientBuckets(zero), 0
    best, worst_idx, worst = -1, 0, Counter[str]()
    in_buckets = buckets.held(0)
    for idx, event in enumerate(events):
        live += event.delta
        if event.gradient:
            copied = buckets.add(event.gradient)
            with_copy, in_buckets = buckets.held(copied), buckets.held(0)
        else:
            with_copy = in_buckets
        total = live + with_copy.total()
        if total > best:
            best, worst_idx, worst = total, idx, with_copy
    return _alive(events[: worst_idx + 1]) + worst + Counter(gathered)


def _reducing(events: tuple[TraceEvent, ...], zero: _GradientReduction) -> Counter[str]:
    """The end of backward."""
    buckets = _GradientBuckets(zero)
    for event in events:
        if event.gradient:
            buckets.add(event.gradient)
    if zero.keeps_gradients:
        buckets.add(min(zero.own if zero.stage < 3 else zero.bucket, zero.bucket))
    return _alive(events) + buckets.held(buckets.reduce())


def _stepping(events: tuple[TraceEvent, ...], zero: _GradientReduction) -> Counter[str]:
    """The optimizer step; outputs are still alive, of the gradients only the rank's own."""
    as_float32 = FP32_BYTES + (zero.each if zero.each != FP32_BYTES else 0)
    alive = _alive(event for event in events if event.phase != GRADIENTS)
    alive["own gradients"] = zero.own * zero.each
    alive["gradients as the optimizer takes them"] = max(NORM_BYTES * zero.largest, as_float32 * zero.group)
    return alive


def _alive(events: Iterable[TraceEvent]) -> Counter[str]:
    """Bytes alive after these events, by the phase that allocated them."""
    names = {phase: PREFIX + phase for phase in (*TOWERS, HEADS, OBJECTIVES)} | {OTHER: PREFIX + HEADS}
    found = Counter[str]()
    for event in events:
        found[names.get(event.phase, event.phase)] += event.delta
    return found


def _owned(sizes: list[int], world_size: int) -> list[int]:
    """For every rank, the elements of the parameters that its part of a flattened group touches."""
    part, found, begins = _partition(sizes, world_size), [0] * world_size, accumulate(sizes, initial=0)
    for size, begin in zip(sizes, begins, strict=False):
        for rank in range(begin // part, min(-(-(begin + size) // part), world_size)):
            found[rank] += size
    return found


# --- settings that lower the peak -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """A setting that lowers the peak, its price in words, and the peak in bytes before and after."""

    change: str
    price: str
    before_bytes: int
    after_bytes: int

    @property
    def bytes(self) -> int:
        """How much lower the peak is; negative where it is higher."""
        return self.before_bytes - self.after_bytes

    def __str__(self) -> str:
        return f"{self.change}: -{_gib(self.bytes)} GiB, to {_gib(self.after_bytes)}; {self.price}"


@dataclass(frozen=True)
class _ChangedRun:
    change: str
    price: str
    config: Config
    ds_config: dict[str, Any]
    world_size: int


def savings(
    config: Config, ds_config: dict[str, Any], world_size: int, attention: str = "sdpa", device: str = "cpu"
) -> list[Saving]:
    """Settings that lower the peak and leave the run's results alone, each by itself, the largest saving first.

    System keys, the DeepSpeed JSON and the number of ranks: a smaller batch or model is another run. What is not
    possible (micro-batches that do not divide, a world size that the streams forbid) and what saves less than a
    hundredth is left out. A second or two for each of about eight.
    """
    before = predict_peak(config, ds_config, world_size, attention, device).device_bytes
    found = []
    for each in _changes(config, ds_config, world_size):
        try:
            after = predict_peak(each.config, each.ds_config, each.world_size, attention, device)
        except UserError:  # rows that do not divide
            continue
        found.append(Saving(each.change, each.price, before, after.device_bytes))
    useful = [saving for saving in found if saving.bytes >= MIN_SAVING * before]
    return sorted(useful, key=lambda saving: saving.after_bytes)


def _changes(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[_ChangedRun]:
    yield from _config_changes(config, ds_config, world_size)
    zero = ds_config["zero_optimization"]

    def changed(**keys: Any) -> dict[str, Any]:
        return {**ds_config, "zero_optimization": {**zero, **keys}}

    if zero_stage(ds_config) < 3:
        price = "parameters and gradients are shared out too, and gathered for every pass"
        yield _ChangedRun("ZeRO stage 3 (--ds_config)", price, config, changed(stage=3), world_size)
    elif not offloads_optimizer(ds_config):
        offload = changed(offload_optimizer={"device": "cpu", "pin_memory": True})
        name = "zero_optimization.offload_optimizer (--ds_config)"
        yield _ChangedRun(name, "the optimizer steps on the host", config, offload, world_size)
    if int(zero.get("reduce_bucket_size", BUCKET)) > SMALL_BUCKET:
        name = f"zero_optimization.reduce_bucket_size={SMALL_BUCKET} (--ds_config)"
        smaller = changed(reduce_bucket_size=SMALL_BUCKET)
        yield _ChangedRun(name, "more, smaller reductions", config, smaller, world_size)
    if config.data.streams % (2 * world_size) == 0:
        price = "every rank has half the rows and half the states"
        yield _ChangedRun(f"{2 * world_size} ranks instead of {world_size}", price, config, ds_config, 2 * world_size)


def _config_changes(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[_ChangedRun]:
    system = config.system
    prices = {"selective": "products and attention are kept, the rest of a block is computed again",
              "full": "blocks run forward twice"}  # fmt: skip
    for mode, price in prices.items():
        if system.activation_checkpointing not in (mode, "full"):
            changed = _with_system(config, "activation_checkpointing", mode)
            yield _ChangedRun(f"system.activation_checkpointing={mode}", price, changed, ds_config, world_size)
    for parts in MICRO_BATCHES:
        if parts > system.clip.micro_batches and config.objectives.clip.weight:
            try:
                changed = _with_system(config, "clip", {"micro_batches": parts})
            except ValidationError:
                continue
            price = "all parts but one run forward twice"
            yield _ChangedRun(f"system.clip.micro_batches={parts}", price, changed, ds_config, world_size)


def _with_system(config: Config, key: str, value: object) -> Config:
    """The config with another system.`key`, validated."""
    given = config.model_dump()
    return Config.model_validate({**given, "system": {**given["system"], key: value}})


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 10 else f"{size / 2**30:.4f}"
