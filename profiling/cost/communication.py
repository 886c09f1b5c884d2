"""Predict the collectives of a step and their bytes from config and DeepSpeed JSON.

    for each in predict_collectives(config, ds_config, world_size=8):
        each.kind, each.purpose, each.message_bytes, each.wire_bytes(8)
    print(collectives_table(config, ds_config, world_size=8))

A *message* is the whole tensor: the output of an all-gather, the input of a reduce-scatter, the tensor of an
all-reduce. On the *wire* a rank sends, around a ring of W, (W-1)/W of the message of an all-gather or reduce-scatter,
and twice that for an all-reduce. Both are per optimizer step and rank, of a steady step (ZeRO-3 learns its order in the
first). engine/reporting/instruments.py counts messages of a run by the same convention, reported as comm/*_mb.

What happens only at reports is not in it: means over ranks, phases, memory and stop flags all-reduce some 200 bytes and
24 (CUDA 32) a rank of the world, once a report; bad samples and joules are sent pickled. The EMA teacher sends nothing:
each rank's shards follow its own. ZeRO is that of deepspeed 0.19.8:

    ZeRO-1, 2   gradients are all-reduced, whole, in buckets (use_multi_rank_bucket_allreduce is on: on the wire twice
                a reduce-scatter, in both stages); after the step each rank's part of the weights is gathered
    ZeRO-3      parameters are gathered as in profiling/cost/zero3_gathers.py, gradients reduce-scattered; small
                parameters, the teacher's too, are gathered again after the step, and the teacher's once more when it
                has moved
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from configs import Config, UserError
from configs.deepspeed import HPZ_SIZE, QUANTIZED_WEIGHTS, is_enabled, zero_stage
from configs.run import System
from engine.optim import parameter_groups
from engine.zero.int8_weights import RUN
from model.latent import feature_width, head_width, moment_channels
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from profiling.cost.zero3_gathers import INSIDE, steady_gathers

FP32_BYTES = 4
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
COMM_DTYPE_BYTES = {"bfp16": 2, "bf16": 2, "fp16": 2, "fp32": 4}
# A rank's part of a flat group begins at a multiple of this many elements in ZeRO-1 and 2.
ALIGN = 2
SINKHORN_PASSES = 4  # over K numbers: a maximum and a sum, then a sum for each of two more iterations
BUCKET = 500_000_000  # elements, DeepSpeed's default for reducing and for gathering
QUANTISED = 1 + FP32_BYTES / RUN  # bytes of a weight sent as int8, with its part of a scale
AFTER = "after the step"  # a gather that waits, and is of small weights in full precision
# Settings that change what is sent in ways this model does not follow: value that leaves it as modelled.
AS_MODELLED = {
    "use_multi_rank_bucket_allreduce": True, "allgather_partitions": True,
    "zero_quantized_nontrainable_weights": False, "zero_quantized_gradients": False,
    "stage3_use_all_reduce_for_fetch_params": False, "stage3_module_granularity_threshold": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """All messages of one kind and purpose in a step, on one rank. `num_messages` go one after the other, each with
    its own latency. `waits`: nothing computes meanwhile. `among`: ranks of one host that take part, if not all."""

    kind: str  # "all_gather", "reduce_scatter" or "all_reduce"
    purpose: str
    message_bytes: int
    num_messages: int = 1
    waits: bool = True
    among: int | None = None

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that a rank sends around a ring."""
        passes, ranks = 2 if self.kind == "all_reduce" else 1, self.ranks(world_size)
        return passes * self.message_bytes * (ranks - 1) / ranks

    def ranks(self, world_size: int) -> int:
        """Number of ranks that take part."""
        return world_size if self.among is None else self.among


def predict_collectives(
    config: Config, ds_config: dict[str, Any], world_size: int, is_separate: bool = False
) -> list[Collective]:
    """One rank's collectives in a steady step, in the order of the step.

    `is_separate`: the same step with a trunk pass for each of clip, ssl global, ssl local and rec: the difference is
    what sharing one pass saves (without micro-batches). Raises UserError for a DeepSpeed setting that is not modelled.
    """
    _require_modelled(config, ds_config)
    if world_size == 1:
        return []
    model = meta_model(config, world_size)
    collectives = list(_losses(config, world_size))
    if zero_stage(ds_config) == 3:
        collectives += _zero3(config, ds_config, model, world_size, is_separate)
    else:
        collectives += _zero12(config, ds_config, model, world_size)
    return [each for each in collectives if each.message_bytes]


def by_kind(collectives: list[Collective]) -> dict[str, int]:
    """Message bytes of a step by kind, as engine/reporting/instruments.py counts them."""
    counts: Counter[str] = Counter()
    for each in collectives:
        counts[each.kind] += each.message_bytes
    return dict(counts)


def collectives_table(config: Config, ds_config: dict[str, Any], world_size: int) -> str:
    """Text table of every collective, message and wire, and the sum with separate trunk passes below."""
    lines = [f"{'collective':<16}{'purpose':<40}{'message MB':>12}{'wire MB':>12}"]
    for is_separate, name in ((False, "sum"), (True, "sum with separate passes")):
        collectives = predict_collectives(config, ds_config, world_size, is_separate)
        rows = [] if is_separate else collectives
        for kind, purpose, message, wire in [
            *((each.kind, each.purpose, each.message_bytes, each.wire_bytes(world_size)) for each in rows),
            ("", name, sum(c.message_bytes for c in collectives), sum(c.wire_bytes(world_size) for c in collectives)),
        ]:
            lines.append(f"{kind:<16}{purpose:<40}{message / 1e6:>12.3f}{wire / 1e6:>12.3f}")
    return "\n".join(lines)


def meta_model(config: Config, world_size: int) -> Pretrainer:
    """The model of one rank on the meta device; shared between configs that build the same, so do not change it."""
    architecture = config.model_copy(update={"system": System()})
    return _meta_model(architecture, RankBatchSizes.per_rank(config, world_size))


@lru_cache(maxsize=4)
def _meta_model(config: Config, rows: RankBatchSizes) -> Pretrainer:
    with torch.device("meta"):
        return Pretrainer(config, rows)


def _require_modelled(config: Config, ds_config: dict[str, Any]) -> None:
    if config.system.gather != "flat":
        raise UserError(
            f"system.gather={config.system.gather} sends features across hosts and then inside them, and the "
            "prediction knows no hosts: set it to flat, or measure (comm/*_mb in the reports)"
        )
    zero = ds_config["zero_optimization"]
    for key, modelled in AS_MODELLED.items():
        if zero.get(key, modelled) != modelled:
            raise UserError(
                f"zero_optimization.{key}={zero[key]} changes what ranks send, in a way the prediction does not model: "
                f"set it to {modelled}, or measure (comm/*_mb in the reports)"
            )


def _losses(config: Config, world_size: int) -> Iterator[Collective]:
    """Collectives of the losses, in float32."""
    model, weights, ssl = config.model, config.objectives, config.objectives.ssl
    if weights.clip.weight:
        features = config.batch.clip * model.clip_width * FP32_BYTES
        yield Collective("all_gather", "captions' features", features)
        yield Collective("reduce_scatter", "captions' features, backward", features)
        if weights.clip.kind == "softmax":
            yield Collective("all_reduce", "captions' softmax sums", 2 * config.batch.clip * FP32_BYTES, num_messages=2)
    if ssl.weight:
        sinkhorn = SINKHORN_PASSES * model.prototypes.num
        targets, passes = (
            (sinkhorn, SINKHORN_PASSES) if ssl.targets == "sinkhorn" else (model.prototypes.bottleneck + 1, 1)
        )
        yield Collective("all_reduce", f"teacher targets, {ssl.targets}", 2 * targets * FP32_BYTES, 2 * passes)
        if ssl.koleo:
            rows = 2 * config.batch.ssl * head_width(model) * FP32_BYTES
            yield Collective("all_gather", "KoLeo's neighbours", rows)
            yield Collective("reduce_scatter", "KoLeo's neighbours, backward", rows)
    align = weights.rec.align
    if align is not None and align.adaptive:
        layer = feature_width(model) * moment_channels(model)
        yield Collective("all_reduce", "balance of rec and alignment", 2 * layer * FP32_BYTES)


def _zero12(config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int) -> Iterator[Collective]:
    groups = [sum(p.numel() for p in group["params"]) for group in optimizer_groups(config, model)]
    unit = ALIGN * world_size
    padded = [-(-size // unit) * unit for size in groups]
    buckets = -(-sum(groups) // _elements(ds_config, "reduce_bucket_size"))
    gradients = sum(groups) * _gradient_bytes(config, ds_config)
    yield Collective("all_reduce", "gradients", gradients, buckets, waits=not _overlaps(ds_config))
    yield Collective("all_reduce", "gradient norm", len(groups) * FP32_BYTES, len(groups))
    pieces = sum(-(-size // _elements(ds_config, "allgather_bucket_size")) for size in padded)
    parameters = sum(padded) * DTYPE_BYTES[config.optim.precision]
    yield Collective("all_gather", "parameters, after the step", parameters, pieces)


def _zero3(
    config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int, is_separate: bool
) -> Iterator[Collective]:
    padded = {name: -(-p.numel() // world_size) * world_size for name, p in model.named_parameters()}
    trained = sum(padded[name] for name, p in model.named_parameters() if p.requires_grad)
    sizes: Counter[str] = Counter()
    gathers, zero = steady_gathers(config, ds_config, model, is_separate), ds_config["zero_optimization"]
    for (purpose, name), count in gathers.parameters.items():
        sizes[purpose] += count * padded[name]
    for purpose, size in sizes.items():
        is_quantised = is_enabled(zero, QUANTIZED_WEIGHTS) and purpose != AFTER
        each = QUANTISED if is_quantised else DTYPE_BYTES[config.optim.precision]
        messages = gathers.messages[purpose] * (2 if is_quantised else 1)  # scales travel by themselves
        among = zero[HPZ_SIZE] if purpose.endswith(INSIDE) else None
        yield Collective(
            "all_gather", f"parameters, {purpose}", round(size * each), messages, waits=purpose == AFTER, among=among
        )
    buckets = -(-trained // _elements(ds_config, "reduce_bucket_size"))
    gradients = trained * _gradient_bytes(config, ds_config)
    yield Collective("reduce_scatter", "gradients", gradients, buckets, waits=not _overlaps(ds_config))
    groups = len(optimizer_groups(config, model))
    yield Collective("all_reduce", "gradient norm", 2 * FP32_BYTES * groups, groups)  # in float64


def optimizer_groups(config: Config, model: Pretrainer) -> list[dict[str, Any]]:
    """Parameter groups as ZeRO gets them: each is flattened into one tensor."""
    return parameter_groups(model, config.optim.weight_decay, one_each=config.optim.kind == "lamb")


def _elements(ds_config: dict[str, Any], bucket: str) -> int:
    return int(ds_config["zero_optimization"].get(bucket, BUCKET))


def keeps_gradients(config: Config, ds_config: dict[str, Any]) -> bool:
    """Whether a rank holds every gradient until backward is over: with micro-batches, and under ZeRO-1 without
    overlap_comm."""
    return config.system.clip.micro_batches > 1 or (zero_stage(ds_config) == 1 and not _overlaps(ds_config))


def _overlaps(ds_config: dict[str, Any]) -> bool:
    """Whether gradients are reduced while backward goes on; DeepSpeed's default is so for ZeRO-3 alone."""
    return bool(ds_config["zero_optimization"].get("overlap_comm", zero_stage(ds_config) == 3))


def _gradient_bytes(config: Config, ds_config: dict[str, Any]) -> int:
    given = ds_config.get("communication_data_type")
    return DTYPE_BYTES[config.optim.precision] if given is None else COMM_DTYPE_BYTES[given]
