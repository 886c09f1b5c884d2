"""Every way to lay a run over a cluster, each with its memory, time and cost: what the planner chooses from.

    cluster = Cluster(gpus=256, rates=rates_of("h100"), links=parse_links("nvlink,ib400", "h100"))
    plans = search(config, cluster, samples=1.1e9)
    plans[0].variant, plans[0].samples_per_second         # the fastest that fits; those that do not fit come last

All variants are system: none changes what is learnt. ZeRO 1, 2 and 3 as configs/deepspeed has them, ZeRO-3 also without
small parameters that stay whole (each of them is a message of its own after every step), and with a second copy on each
host (zero_hpz_partition_size) where communication shows; micro-batches of the gradient cache; activation checkpointing;
FP8 in the blocks where the GPU has it. What changes the numbers that travel (int8 weights, int4 gradients) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from configs import Config, UserError
from configs.architecture import Text, Vit
from configs.scale_out import SHARDED
from model.rows import Rows
from profiling.flops import StepFlops
from profiling.plan.rates import Links, Rates
from profiling.plan.step_time import StepTime, step_time
from profiling.plan.variant import Variant
from profiling.plan.work import Build, fp8_pays, step_work
from profiling.step.communication import Collective, predict
from profiling.step.elementwise import kept_bytes
from profiling.step.flops import step_flops
from profiling.step.footprint import Footprint
from profiling.step.peak import predict_peak

CAPTIONS_FILLED = 0.3  # share of the slots that packed captions take [assumed: captions of the web]
Stage = tuple[int, int | None]  # of ZeRO, and the persistence threshold
STAGES: tuple[Stage, ...] = ((1, None), (2, None), (3, None), (3, 0))
PARTS = (1, 2, 4, 8, 16, 32, 64)
MODES = ("off", "selective", "full")
SHOWS = 0.01  # of a step that waits for communication, from which a second copy is tried
HELPS = 0.95  # of the memory with half the micro-batches, at most: less is no help


@dataclass(frozen=True)
class Cluster:
    """`gpus` equal devices. `build` is what the engine makes of blocks there."""

    gpus: int
    rates: Rates
    links: Links | None
    build: Build


@dataclass(frozen=True)
class Plan:
    """A variant on a cluster: per rank and step, and for the whole run of `samples`."""

    variant: Variant
    cluster: Cluster
    rows: Rows
    footprint: Footprint
    time: StepTime
    flops: StepFlops
    wire_bytes: float
    latency: float  # seconds of the communication that no bandwidth would save
    samples: float

    @property
    def memory(self) -> int:
        """Bytes of one rank at the worst moment of a step."""
        return self.footprint.device_bytes

    @property
    def fits(self) -> bool:
        """Whether that is within what a device has for it."""
        return self.memory <= self.cluster.rates.memory_bytes

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs together; a sample is a row of clip."""
        return self.rows.clip * self.cluster.gpus / self.time.seconds

    @property
    def mfu(self) -> float:
        """Of the bf16 peak, or of the FP8 peak with FP8 in the blocks, as runs report it."""
        peaks = self.cluster.rates.peaks
        peak = peaks["bf16" if self.variant.linear == "bf16" else "fp8"] if peaks else 0
        return self.flops.model_flops / self.time.seconds / peak if peak else float("nan")

    @property
    def days(self) -> float:
        """The run's, without a pause: steps and nothing else."""
        return self.samples / self.samples_per_second / 86_400

    @property
    def gpu_hours(self) -> float:
        """The run's days on all GPUs."""
        return 24 * self.days * self.cluster.gpus

    @property
    def kilowatt_hours(self) -> float:
        """Of the GPUs alone; without hosts, network and cooling. NaN where their power is not known."""
        watts = self.cluster.rates.watts
        return self.gpu_hours * watts / 1000 if watts else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """All of it, for other programs."""
        return {
            "variant": vars(self.variant),
            "fits": self.fits,
            "memory_bytes": {each.name: each.bytes for each in self.footprint.components},
            "device_bytes": self.memory,
            "seconds": vars(self.time),
            "samples_per_second": self.samples_per_second,
            "mfu": self.mfu,
            "wire_bytes": self.wire_bytes,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "kilowatt_hours": self.kilowatt_hours,
        }


def search(config: Config, cluster: Cluster, samples: float, is_exhaustive: bool = False) -> list[Plan]:
    """Plans, those that fit by speed, then those that do not by memory.

    Micro-batches and activation checkpointing buy memory with time: unless `is_exhaustive`, more of them is tried only
    where it could help. Raises UserError where the GPUs do not divide the config's batches and streams.
    """
    config.check_world(cluster.gpus)
    planner = _Planner(config, cluster, samples)
    plans = [plan for stage in STAGES for plan in planner.climb(stage, is_exhaustive)]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.seconds if plan.fits else plan.memory))


def as_compiled(footprint: Footprint, config: Config) -> Footprint:
    """The footprint, which knows eager blocks, with what compiled ones keep without checkpointing; with it the two keep
    alike."""
    parts: dict[str, Vit | Text] = {
        "activations: trunk": config.model.trunk,
        "activations: decoder": config.model.decoder,
        "activations: text": config.model.text,
    }
    shares = {
        name: kept_bytes(part, config.optim.precision, True) / kept_bytes(part, config.optim.precision, False)
        for name, part in parts.items()
    }
    scaled = (replace(each, bytes=round(each.bytes * shares.get(each.name, 1))) for each in footprint.components)
    return Footprint(tuple(scaled))


def _latency(collectives: list[Collective], cluster: Cluster) -> float:
    """Seconds that messages of no size would take."""
    if cluster.links is None:
        return 0.0
    return sum(cluster.links.seconds(0, each.num_messages, each.ranks(cluster.gpus)) for each in collectives)


@dataclass(frozen=True)
class _Planner:
    config: Config
    cluster: Cluster
    samples: float

    def climb(self, stage: Stage, is_exhaustive: bool) -> Iterator[Plan]:
        """Variants of a stage, each with less memory and more time than the one before: down to the first that fits
        without checkpointing, or until more micro-batches no longer help; one alone where the states do not fit."""
        least = math.inf
        for parts in (parts for parts in PARTS if self._admits(parts)):
            for mode in MODES:
                plans = list(self.plans(stage, parts, mode))
                yield from plans
                if is_exhaustive:
                    continue
                plan = plans[0]
                if mode == MODES[0]:
                    if plan.fits or plan.memory > HELPS * least or plan.footprint.static_bytes > self._memory:
                        return
                    least = plan.memory
                if plan.fits:
                    break

    @property
    def _memory(self) -> float:
        return self.cluster.rates.memory_bytes

    def _admits(self, parts: int) -> bool:
        try:
            Rows.per_rank(Variant(1, None, parts, "off", "bf16").apply(self.config), self.cluster.gpus)
        except UserError:
            if parts == 1:
                raise
            return False
        return True

    def plans(self, stage: Stage, parts: int, mode: str) -> Iterator[Plan]:
        """A layout with every kind of product that blocks can have; and with a second copy on each host where the step
        waits for communication and something is gathered twice."""
        variant = Variant(*stage, parts, mode, "bf16")
        found = list(self._with_products(variant))
        yield from found
        links, gpus = self.cluster.links, self.cluster.gpus
        if links is None or stage[0] != SHARDED or gpus <= links.per_node or gpus % links.per_node:
            return
        if any(plan.time.exposed > SHOWS * plan.time.seconds for plan in found):
            second = self._with_products(replace(variant, hpz=links.per_node))
            yield from (copy for copy, plan in zip(second, found, strict=True) if copy.time.exposed < plan.time.exposed)

    def _with_products(self, variant: Variant) -> Iterator[Plan]:
        config, mode = variant.apply(self.config), variant.checkpointing
        ds_config = variant.ds_config(config, self.cluster.gpus)
        footprint = predict_peak(config, ds_config, self.cluster.gpus, self._attention, self.cluster.build.device)
        if self.cluster.build.is_compiled and mode == "off":
            footprint = as_compiled(footprint, config)
        collectives = predict(config, ds_config, self.cluster.gpus)
        for linear in self._linears(config):
            yield self._plan(replace(variant, linear=linear), footprint, collectives)

    def _plan(self, variant: Variant, footprint: Footprint, collectives: list[Collective]) -> Plan:
        config, cluster = variant.apply(self.config), self.cluster
        rows = Rows.per_rank(config, cluster.gpus)
        captions = CAPTIONS_FILLED * rows.clip * config.model.text.context
        work = step_work(config, rows, cluster.build, captions, shards=cluster.gpus)
        return Plan(
            variant,
            cluster,
            rows,
            footprint,
            step_time(work, cluster.rates, collectives, cluster.links, cluster.gpus),
            step_flops(config, rows, captions, backend=cluster.build.attention, device=cluster.build.device),
            sum(each.wire_bytes(cluster.gpus) for each in collectives),
            _latency(collectives, cluster),
            self.samples,
        )

    def _linears(self, config: Config) -> list[str]:
        """FP8 where the device and the run's precision have it, and where a product is large enough to become so."""
        has_fp8 = "fp8" in self.cluster.rates.peaks and config.optim.precision == "bf16"
        pays = has_fp8 and fp8_pays(config, Rows.per_rank(config, self.cluster.gpus))
        return ["bf16", "fp8_torchao"] if pays else ["bf16"]

    @property
    def _attention(self) -> str:
        """As profiling.step.peak names it: fused kernels keep no scores."""
        return "matmul" if self.cluster.build.attention == "matmul" else "sdpa"
