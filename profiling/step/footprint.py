"""What a rank holds in memory, predicted from the config and the DeepSpeed JSON, component by component.

    footprint = predict(config, ds_config, world_size=8)
    print(footprint.table())

States are those of deepspeed 0.19.8 as its engine holds them between two steps; tests/profiling/test_footprint.py holds
each stage against the tensors of a real engine. For N trained and F frozen parameters of b bytes on W ranks:

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

and while a step runs
    gathered parameters    -                               the most that is whole at once, by profiling/step/gathers.py
    second copies          -                               (N + F) b / zero_hpz_partition_size
    kept gradients         N b                             N b               with system.clip.micro_batches > 1, and
                                                                             under ZeRO-1 without overlap_comm

A lone rank gathers nothing: its shard is the parameter. What a step holds beside all this, activations above all, and
when, is added by profiling/step/peak.py: its sum is the peak, this one's is a floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from configs import Config
from configs.ds import offloads_optimizer, zero_stage
from configs.scale_out import HPZ, is_asked
from model.pretrainer import Pretrainer
from profiling.step.communication import (
    ALIGN,
    BUCKET,
    DTYPE_BYTES,
    FP32_BYTES,
    keeps_gradients,
    meta_model,
    optimizer_groups,
)
from profiling.step.gathers import Settings
from profiling.step.layer_flops import perceptual_parameters
from profiling.step.pretend import frozen_encoder
from profiling.step.steady_gathers import steady_gathers

OPTIMIZER_BYTES = 3 * FP32_BYTES  # weights and two moments
GATHERED, SECOND = "gathered parameters", "second copies"


@dataclass(frozen=True)
class Component:
    """Bytes on one rank. `is_static`: held between steps too; `is_on_host`: in the host's memory, not the device's."""

    name: str
    bytes: int
    is_static: bool = True
    is_on_host: bool = False


@dataclass(frozen=True)
class Footprint:
    """All components of one rank."""

    components: tuple[Component, ...]

    @property
    def static_bytes(self) -> int:
        """Held between two steps on the device."""
        return sum(each.bytes for each in self.components if each.is_static and not each.is_on_host)

    @property
    def device_bytes(self) -> int:
        """Held on the device when all components are."""
        return sum(each.bytes for each in self.components if not each.is_on_host)

    def table(self) -> str:
        """For people, in GiB."""
        lines = [f"{'component':<24}{'GiB':>10}"]
        for each in self.components:
            where = " on the host" if each.is_on_host else "" if each.is_static else " while a step runs"
            lines.append(f"{each.name:<24}{each.bytes / 2**30:>10.3f}{where}")
        return "\n".join([*lines, f"{'sum on the device':<24}{self.device_bytes / 2**30:>10.3f}"])


def predict(config: Config, ds_config: dict[str, Any], world_size: int) -> Footprint:
    """One rank's states, and what ZeRO gathers for a step. Activations are not in it."""
    model = meta_model(config, world_size)
    components = _stage_3 if zero_stage(ds_config) == 3 else _stage_1_and_2
    found = components(config, ds_config, model, world_size)
    if keeps_gradients(config, ds_config):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = trained * DTYPE_BYTES[config.optim.precision]
        found.append(Component("kept gradients", size, is_static=False))
    if config.objectives.rec.weight and config.objectives.rec.perceptual:
        found.append(Component("perceptual network", perceptual_parameters() * FP32_BYTES))
    found.append(Component("frozen encoder", frozen_parameters(config) * DTYPE_BYTES[config.optim.precision]))
    return Footprint(tuple(each for each in found if each.bytes))


def frozen_parameters(config: Config) -> int:
    """Numbers in the trunk that objectives.rec.align names; 0 without."""
    with torch.device("meta"):
        encoder = frozen_encoder(config, "sdpa")
    return 0 if encoder is None else sum(parameter.numel() for parameter in encoder.parameters())


def _stage_3(config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int) -> list[Component]:
    each, zero = DTYPE_BYTES[config.optim.precision], ds_config["zero_optimization"]
    shards = {name: -(-p.numel() // world_size) for name, p in model.named_parameters()}
    trained = sum(shards[name] for name, p in model.named_parameters() if p.requires_grad)
    frozen = sum(shards.values()) - trained
    threshold = Settings.of(ds_config).persistence
    small = [name for name, p in model.named_parameters() if p.numel() <= threshold]
    whole = sum(shards[name] for name in small if not name.startswith("teacher.")) * world_size
    most_live = max(0, steady_gathers(config, ds_config, model).most_live - whole)
    if world_size == 1:  # a lone rank's shard is the parameter: gathering copies nothing
        whole = most_live = 0
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    freed = sum(p.numel() for p in model.parameters()) - sum(shards[name] for name in small) * world_size
    second = freed // zero[HPZ] if is_asked(zero, HPZ) else 0
    return [
        Component("parameters", (trained + whole) * each),
        Component("frozen teacher", frozen * each),
        Component("optimizer", trained * OPTIMIZER_BYTES, is_on_host=offloads_optimizer(ds_config)),
        Component("EMA teacher", frozen * FP32_BYTES),
        _average(config, ds_config, trained),
        Component("gradients", trained * each),
        Component("reduce bucket", bucket * each),
        Component(GATHERED, most_live * each, is_static=False),
        Component(SECOND, max(0, second) * each, is_static=False),
    ]


def _stage_1_and_2(config: Config, ds_config: dict[str, Any], model: Pretrainer, world_size: int) -> list[Component]:
    each, unit = DTYPE_BYTES[config.optim.precision], ALIGN * world_size
    groups = [sum(p.numel() for p in group["params"]) for group in optimizer_groups(config, model)]
    trained = sum(-(-size // unit) * unit for size in groups)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    on_host = offloads_optimizer(ds_config)
    return [
        Component("parameters", trained * each),
        Component("frozen teacher", frozen * each),
        Component("optimizer", trained // world_size * OPTIMIZER_BYTES, is_on_host=on_host),
        Component("EMA teacher", frozen * FP32_BYTES),
        _average(config, ds_config, trained // world_size),
    ]


def _average(config: Config, ds_config: dict[str, Any], own: int) -> Component:
    """Where the optimizer has its weights; nothing without `ema`."""
    size = 0 if config.ema is None else own * FP32_BYTES
    return Component("average of weights", size, is_on_host=offloads_optimizer(ds_config))
