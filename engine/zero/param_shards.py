"""A rank's own shard of every parameter: ranges of the flattened tensors, readable and writable.

    [f] = [f for f in fragments(engine) if f.name == "trunk.norm.weight"]
    f.start, f.numel                             # rank 1 of 2 of a 384-vector: (192, 192)
    f.read("exp_avg")                            # (192,) float32
    f.write("exp_avg", values)
    sync_from_masters(engine)                    # once all are written

Measured with deepspeed 0.19.8: a persistent parameter keeps its gathered copy, so writing its shard alone changes
nothing; hence `drop_gathered` and
`sync_from_masters`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from engine import distributed
from engine.checkpoint.tensor_ranges import MASTER
from engine.zero.optimizer import link_moments


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the parameter's shape, whether it is partitioned at the moment or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@dataclass(frozen=True)
class Fragment:
    """This rank's range [start, start + numel) of one flattened trainable parameter."""

    name: str
    parameter: nn.Parameter
    start: int
    numel: int

    def read(self, key: str) -> Tensor:
        """Return (numel,) float32: the master weight (key "fp32") or a moment. Copy or view: change it by `write`."""
        if is_partitioned(self.parameter):
            whole = (
                safe_get_local_fp32_param(self.parameter)
                if key == MASTER
                else safe_get_local_optimizer_state(self.parameter, key)
            )
            return whole.detach()[: self.numel]  # the last rank's shard is padded
        mapping = self.parameter._hp_mapping  # type: ignore[attr-defined]
        return mapping.get_hp_fragment(None if key == MASTER else key).detach()

    def write(self, key: str, value: Tensor) -> None:
        """Set it to `value` (numel,). When all are written, `sync_from_masters` updates the model's own copies."""
        if not is_partitioned(self.parameter):
            self.read(key).copy_(value)
            return
        padded = _padded(value, shard(self.parameter))
        if key == MASTER:
            safe_set_local_fp32_param(self.parameter, padded)
            shard(self.parameter).copy_(padded)
        else:
            safe_set_local_optimizer_state(self.parameter, padded, key)


def fragments(engine: Any) -> list[Fragment]:
    """List this rank's fragments of all trainable parameters, in the model's order; a rank may own none of one."""
    link_moments(engine.optimizer)
    own = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        start, numel = local_range(parameter)
        if numel:
            own.append(Fragment(name, parameter, start, numel))
    return own


def local_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return (start, numel) of what this rank owns of the flattened parameter, without padding.

    ZeRO-3 cuts every parameter evenly; ZeRO-1 and 2 cut the concatenation of all of them, and leave a frozen parameter
    whole on every rank.
    """
    if is_partitioned(parameter):
        size = shard(parameter).numel()
        start = min(size * distributed.rank(), parameter.ds_numel)  # type: ignore[attr-defined]
        return start, min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if not parameter.requires_grad:
        return 0, parameter.numel()
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 partitions this parameter."""
    return hasattr(parameter, "ds_tensor")


def shard(parameter: nn.Parameter) -> Tensor:
    """Return the live flat shard of a ZeRO-3 parameter in the model's dtype, padded; else the whole flat parameter."""
    return parameter.ds_tensor.data if is_partitioned(parameter) else parameter.data.view(-1)  # type: ignore[attr-defined]


def drop_gathered(parameters: Iterable[nn.Parameter]) -> None:
    """Drop every other copy of parameters whose shards were written; the next forward gathers anew.

    A persistent parameter has its gathered copy, which `partition` frees. With hierarchical partition a host has a
    second shard of it, filled when it was last freed: DeepSpeed drops those of what it trains after its own step, and
    never a frozen parameter's, so a teacher would stay what it was at the first one.
    """
    for parameter in parameters:
        if not is_partitioned(parameter):
            continue
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]
        parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def sync_from_masters(engine: Any) -> None:
    """Update every gathered or replicated copy of a weight from its fp32 master, after fragments were written.

    ZeRO-1 and 2 keep the whole model on every rank, so the ranges other ranks wrote have to come over.
    """
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    drop_gathered(parameters)
    for parameter in parameters:
        if not is_partitioned(parameter):
            parameter.data.copy_(safe_get_full_fp32_param(parameter))


def replicated_tensors(engine: Any) -> list[tuple[str, Tensor]]:
    """List (name, tensor) of what every rank holds whole and alike, with the same names on every rank.

    Parameters under ZeRO-1 and 2, frozen ones too; under ZeRO-3 those that stay gathered between steps; buffers.
    """
    found = [
        (name, parameter.data)
        for name, parameter in engine.module.named_parameters()
        if not is_partitioned(parameter) or parameter.ds_status == ZeroParamStatus.AVAILABLE
    ]
    return [*found, *((name, buffer.data) for name, buffer in engine.module.named_buffers())]


def rounded_copies(engine: Any) -> list[tuple[str, Tensor, Tensor]]:
    """List (name, the model's values, their fp32 masters) of this rank's shards, each (numel,).

    Between steps the values are the masters, rounded.
    """
    found = []
    for fragment in fragments(engine):
        start = 0 if is_partitioned(fragment.parameter) else fragment.start
        values = shard(fragment.parameter)[start : start + fragment.numel]
        found.append((fragment.name, values, fragment.read(MASTER)))
    return found


def _padded(value: Tensor, like: Tensor) -> Tensor:
    padded = torch.zeros(like.numel(), dtype=value.dtype, device=like.device)
    padded[: value.numel()].copy_(value)
    return padded
