"""Which setting lowers the peak of a step, and by how much: changes that leave the run's results alone, predicted.

    for saving in savings(config, ds_config, world_size=8):        # the largest first
        print(saving)        # "system.activation_checkpointing=full: -31.2 GiB, to 18.4; blocks run forward twice"

Only system keys, the DeepSpeed JSON and the number of ranks: a smaller batch or model is another run. What cannot be
had here (a number of micro-batches that does not divide, a world size that the streams forbid) is left out, and so is
what saves less than a hundredth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from configs import Config, UserError
from configs.ds import offloads_optimizer, zero_stage
from profiling.step.communication import BUCKET
from profiling.step.footprint import Footprint
from profiling.step.peak import predict_peak

LEAST = 0.01  # of the peak: less is no advice
SMALL_BUCKET = 50_000_000  # elements; below it reductions become too many
PARTS = (2, 4, 8)


@dataclass(frozen=True)
class Saving:
    """A change, what it costs in words, and the peak in bytes before and after it."""

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
class _Variant:
    change: str
    price: str
    config: Config
    ds_config: dict[str, Any]
    world_size: int


def savings(
    config: Config, ds_config: dict[str, Any], world_size: int, attention: str = "sdpa", device: str = "cpu"
) -> list[Saving]:
    """Each change by itself against the run as it is. A second or two for every one of about eight."""
    before = predict_peak(config, ds_config, world_size, attention, device).device_bytes
    found = []
    for each in _variants(config, ds_config, world_size):
        try:
            after = predict_peak(each.config, each.ds_config, each.world_size, attention, device)
        except UserError:  # rows that do not divide
            continue
        found.append(Saving(each.change, each.price, before, after.device_bytes))
    useful = [saving for saving in found if saving.bytes >= LEAST * before]
    return sorted(useful, key=lambda saving: saving.after_bytes)


def largest_parts(footprint: Footprint, count: int = 4) -> str:
    """ "activations: trunk 61.2 GiB, optimizer 12.1, ...": what most of the peak is made of."""
    parts = sorted((part for part in footprint.components if not part.is_on_host), key=lambda part: -part.bytes)
    return ", ".join(f"{part.name} {_gib(part.bytes)}" for part in parts[:count])


def _variants(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[_Variant]:
    yield from _of_config(config, ds_config, world_size)
    zero = ds_config["zero_optimization"]

    def changed(**keys: Any) -> dict[str, Any]:
        return {**ds_config, "zero_optimization": {**zero, **keys}}

    if zero_stage(ds_config) < 3:
        price = "parameters and gradients are shared out too, and gathered for every pass"
        yield _Variant("ZeRO stage 3 (--ds_config)", price, config, changed(stage=3), world_size)
    elif not offloads_optimizer(ds_config):
        price = "the optimizer steps on the host"
        offload = changed(offload_optimizer={"device": "cpu", "pin_memory": True})
        yield _Variant("zero_optimization.offload_optimizer (--ds_config)", price, config, offload, world_size)
    if int(zero.get("reduce_bucket_size", BUCKET)) > SMALL_BUCKET:
        name = f"zero_optimization.reduce_bucket_size={SMALL_BUCKET} (--ds_config)"
        yield _Variant(name, "more, smaller reductions", config, changed(reduce_bucket_size=SMALL_BUCKET), world_size)
    if config.data.streams % (2 * world_size) == 0:
        price = "every rank has half the rows and half the states"
        yield _Variant(f"{2 * world_size} ranks instead of {world_size}", price, config, ds_config, 2 * world_size)


def _of_config(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[_Variant]:
    system = config.system
    prices = {"selective": "products and attention are kept, the rest of a block is computed again",
              "full": "blocks run forward twice"}  # fmt: skip
    for mode, price in prices.items():
        if system.activation_checkpointing not in (mode, "full"):
            changed = _with(config, "activation_checkpointing", mode)
            yield _Variant(f"system.activation_checkpointing={mode}", price, changed, ds_config, world_size)
    for parts in PARTS:
        if parts > system.clip.micro_batches and config.objectives.clip.weight:
            try:
                changed = _with(config, "clip", {"micro_batches": parts})
            except ValidationError:
                continue
            price = "all parts but one run forward twice"
            yield _Variant(f"system.clip.micro_batches={parts}", price, changed, ds_config, world_size)


def _with(config: Config, key: str, value: object) -> Config:
    """With another system.`key`, held to every rule of the schema."""
    given = config.model_dump()
    return Config.model_validate({**given, "system": {**given["system"], key: value}})


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 10 else f"{size / 2**30:.4f}"
