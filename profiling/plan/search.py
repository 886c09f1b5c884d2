"""All ways to distribute a run over a cluster, each with its memory, time and cost: what the planner chooses from.

    cluster = Cluster(gpus=256, rates=rates_of("h100"), links=parse_links("nvlink,ib400", "h100"), mode=mode)
    plans = search(config, cluster, samples=1.1e9)
    plans[0].variant, plans[0].samples_per_second         # the fastest that fits; those that do not fit come last
    plans[0].variant.overrides                            # ["system.clip.micro_batches=2", ...], for the command line
    plans[0].variant.ds_json()                            # what --ds_config reads

Variants change the system, not what is learnt: ZeRO 1, 2 and 3 as configs/deepspeed has them, ZeRO-3 also without small
parameters that stay whole (each is a message of its own after every step), and with a second copy on each host
(zero_hpz_partition_size) where the step waits for communication; micro-batches of the gradient cache; activation
checkpointing; FP8 in the blocks where the GPU has it. What rounds the numbers that are sent (int8 weights, int4
gradients) is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import configs
from configs import Config, UserError
from configs.deepspeed import HPZ_SIZE, ZERO_3, complete_ds_config
from model.packing import RankBatchSizes
from profiling.cost.communication import Collective, predict_collectives
from profiling.cost.flops import StepFlops
from profiling.cost.peak_memory import MemoryFootprint, predict_peak
from profiling.cost.step_flops import step_flops
from profiling.plan.rates import DeviceRates, NetworkLinks
from profiling.plan.step_time import ExecutionMode, StepTime, fp8_pays, step_time, step_work

DEEPSPEED = Path(configs.__file__).parent / "deepspeed"
CAPTIONS_FILLED = 0.3  # fraction of the slots that packed captions take [assumed: captions of the web]
Stage = tuple[int, int | None]  # of ZeRO, and the persistence threshold
STAGES: tuple[Stage, ...] = ((1, None), (2, None), (3, None), (3, 0))
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CHECKPOINTING = ("off", "selective", "full")
WAITS = 0.01  # fraction of the step exposed to communication, from which a second copy is tried
HELPS = 0.95  # of the memory with half the micro-batches, at most: less is no help


@dataclass(frozen=True)
class LayoutVariant:
    """Settings that distribute a run: keys of --ds_config, then of --config.

    `persistence`: stage3_param_persistence_threshold; None as the JSON has it.
    """

    stage: int
    persistence: int | None
    micro_batches: int
    checkpointing: str
    linear: str
    hpz: int = 1  # zero_hpz_partition_size: the GPUs of a host, or none

    @property
    def overrides(self) -> list[str]:
        """For the command line of a run."""
        return [
            f"system.clip.micro_batches={self.micro_batches}",
            f"system.activation_checkpointing={self.checkpointing}",
            f"system.linear={self.linear}",
        ]

    @property
    def name(self) -> str:
        """The ZeRO part in words: "ZeRO-3 all sharded, a copy a host of 8"."""
        second = "" if self.hpz == 1 else f", a copy a host of {self.hpz}"
        return f"ZeRO-{self.stage}" + ("" if self.persistence is None else " all sharded") + second

    @property
    def is_shipped(self) -> bool:
        """Whether configs/deepspeed has it."""
        return self.persistence is None and self.hpz == 1

    def ds_json(self) -> dict[str, Any]:
        """What --ds_config reads: the shipped file of the stage, changed."""
        found: dict[str, Any] = json.loads((DEEPSPEED / f"zero{self.stage}.json").read_text())
        if self.persistence is not None:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = self.persistence
        if self.hpz > 1:
            found["zero_optimization"][HPZ_SIZE] = self.hpz
        return found

    def ds_config(self, config: Config, world_size: int) -> dict[str, Any]:
        """What DeepSpeed gets: the JSON completed from the config."""
        return complete_ds_config(self.ds_json(), config, world_size)

    def apply(self, config: Config) -> Config:
        """The config with these settings. Raises UserError where its rules refuse them."""
        given = config.model_dump()
        given["system"]["clip"]["micro_batches"] = self.micro_batches
        given["system"]["activation_checkpointing"] = self.checkpointing
        given["system"]["linear"] = self.linear
        try:
            return Config.model_validate(given)
        except ValidationError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class Cluster:
    """`gpus` equal devices, and how the engine runs blocks there."""

    gpus: int
    rates: DeviceRates
    links: NetworkLinks | None
    mode: ExecutionMode


@dataclass(frozen=True)
class LayoutPlan:
    """A variant on a cluster: per rank and step, and for the whole run of `samples`."""

    variant: LayoutVariant
    cluster: Cluster
    rows: RankBatchSizes
    footprint: MemoryFootprint
    time: StepTime
    flops: StepFlops
    wire_bytes: float
    latency: float  # seconds of communication that messages of no size would take
    samples: float

    @property
    def memory(self) -> int:
        """Bytes of one rank at the worst moment of a step."""
        return self.footprint.device_bytes

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
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
        """Of the run, steps alone."""
        return self.samples / self.samples_per_second / 86_400

    @property
    def gpu_hours(self) -> float:
        """Of the run on all GPUs."""
        return 24 * self.days * self.cluster.gpus

    @property
    def kilowatt_hours(self) -> float:
        """Of the GPUs alone, without hosts, network and cooling. NaN where their power is not known."""
        watts = self.cluster.rates.watts
        return self.gpu_hours * watts / 1000 if watts else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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


def search(config: Config, cluster: Cluster, samples: float, is_exhaustive: bool = False) -> list[LayoutPlan]:
    """Return plans: those that fit by speed, then those that do not by memory.

    Micro-batches and activation checkpointing buy memory with time: unless `is_exhaustive`, more of them is tried only
    where it could help. Raises UserError where the GPUs do not divide the config's batches and streams.
    """
    config.check_world(cluster.gpus)
    search = _LayoutSearch(config, cluster, samples)
    plans = [plan for stage in STAGES for plan in search.of_stage(stage, is_exhaustive)]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.seconds if plan.fits else plan.memory))


@dataclass(frozen=True)
class _LayoutSearch:
    config: Config
    cluster: Cluster
    samples: float

    def of_stage(self, stage: Stage, is_exhaustive: bool) -> Iterator[LayoutPlan]:
        """Variants of a stage, each with less memory and more time than the one before: down to the first that fits
        without checkpointing, or until more micro-batches no longer help; one alone where the states do not fit."""
        least, memory_bytes = math.inf, self.cluster.rates.memory_bytes
        for parts in (parts for parts in MICRO_BATCHES if self._divides(parts)):
            for checkpointing in CHECKPOINTING:
                plans = list(self._with_second_copies(LayoutVariant(*stage, parts, checkpointing, "bf16")))
                yield from plans
                if is_exhaustive:
                    continue
                plan = plans[0]
                if checkpointing == CHECKPOINTING[0]:
                    if plan.fits or plan.memory > HELPS * least or plan.footprint.static_bytes > memory_bytes:
                        return
                    least = plan.memory
                if plan.fits:
                    break

    def _divides(self, micro_batches: int) -> bool:
        try:
            RankBatchSizes.per_rank(
                LayoutVariant(1, None, micro_batches, "off", "bf16").apply(self.config), self.cluster.gpus
            )
        except UserError:
            if micro_batches == 1:
                raise
            return False
        return True

    def _with_second_copies(self, variant: LayoutVariant) -> Iterator[LayoutPlan]:
        """Also with a second copy on each host, where the step waits for communication and gathers something twice."""
        found = list(self._with_products(variant))
        yield from found
        links, gpus = self.cluster.links, self.cluster.gpus
        if links is None or variant.stage != ZERO_3 or gpus <= links.per_node or gpus % links.per_node:
            return
        if any(plan.time.exposed > WAITS * plan.time.seconds for plan in found):
            second = self._with_products(replace(variant, hpz=links.per_node))
            yield from (copy for copy, plan in zip(second, found, strict=True) if copy.time.exposed < plan.time.exposed)

    def _with_products(self, variant: LayoutVariant) -> Iterator[LayoutPlan]:
        """In bf16, and in FP8 where device and precision have it and a product is large enough."""
        config, cluster = variant.apply(self.config), self.cluster
        ds_config = variant.ds_config(config, cluster.gpus)
        attention = "matmul" if cluster.mode.attention == "matmul" else "sdpa"
        footprint = predict_peak(config, ds_config, cluster.gpus, attention, cluster.mode.device)
        if cluster.mode.is_compiled and variant.checkpointing == "off":  # with it compiled and eager blocks keep alike
            footprint = footprint.as_compiled(config)
        collectives = predict_collectives(config, ds_config, cluster.gpus)
        has_fp8 = "fp8" in cluster.rates.peaks and config.optim.precision == "bf16"
        pays = has_fp8 and fp8_pays(config, RankBatchSizes.per_rank(config, cluster.gpus))
        for linear in ["bf16", "fp8_torchao"] if pays else ["bf16"]:
            yield self._plan(replace(variant, linear=linear), footprint, collectives)

    def _plan(self, variant: LayoutVariant, footprint: MemoryFootprint, collectives: list[Collective]) -> LayoutPlan:
        config, cluster, mode = variant.apply(self.config), self.cluster, self.cluster.mode
        rows = RankBatchSizes.per_rank(config, cluster.gpus)
        captions = CAPTIONS_FILLED * rows.clip * config.model.text.context
        flops = step_flops(config, rows, captions, backend=mode.attention, device=mode.device)
        work = step_work(config, rows, mode, flops, captions, shards=cluster.gpus)
        time = step_time(work, cluster.rates, collectives, cluster.links, cluster.gpus)
        wire_bytes = sum(each.wire_bytes(cluster.gpus) for each in collectives)
        latency = 0.0
        if cluster.links is not None:
            latency = sum(cluster.links.seconds(0, c.num_messages, c.ranks(cluster.gpus)) for c in collectives)
        return LayoutPlan(variant, cluster, rows, footprint, time, flops, wire_bytes, latency, self.samples)
