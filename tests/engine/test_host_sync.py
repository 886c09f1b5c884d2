"""Between two reports nobody waits for the device: a step is queued while the one before still runs.

On the CPU, DeepSpeed is shown a stand-in for a device with streams (stream_stand_in.py), and every wait of the host is
counted by who asked; tensors' own reads are counted beside them.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import Counter
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config
from configs.deepspeed import complete_ds_config
from engine.build import PretrainParts, build_pretraining
from engine.health.anomalies import AnomalyMonitor
from engine.reporting.step_meter import StepMeter
from engine.step import train_step
from model.losses.comm import Comm
from tests import stream_stand_in
from tests.cuda_waits import waits_of_host
from tests.engine import ranks
from tests.harness import run_ranks
from tests.stream_stand_in import Stream, asker
from tests.tiny import random_batch, tiny_config

# What ends on the host: a number read, or a shape that depends on one.
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave")
METHODS = ("cpu", "tolist", "numpy")  # torch does not dispatch them for a tensor that is on the CPU already
# How far the host of ZeRO-3 may run ahead: three buckets and three gathered modules (engine/zero/streams.py).
BOUNDS = ("stage3.py:__reduce_and_partition_ipg_grads", "partitioned_param_coordinator.py:_fetch_sub_module_impl")
ON_HOST = "model/text.py:pack_captions"  # reads the captions as the loader gave them: they never were elsewhere


class HostReads(TorchDispatchMode):
    """Counts, by who asked, whatever would wait for a GPU if the tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.thread = threading.get_ident()  # others make batches ahead
        self.plain = {name: getattr(Tensor, name) for name in METHODS}

    def __enter__(self) -> HostReads:
        for name in METHODS:
            setattr(Tensor, name, self._counted(name))
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        for name, method in self.plain.items():
            setattr(Tensor, name, method)
        super().__exit__(*failure)

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operator._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if name in OPERATORS or by_mask:
            self.seen[f"{name} in {asker(__file__)}"] += 1
        return operator(*arguments, **(options or {}))

    def _counted(self, name: str) -> Any:
        def method(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == self.thread and asker(__file__) != ON_HOST:
                self.seen[f"{name} in {asker(__file__)}"] += 1
            return self.plain[name](tensor, *arguments, **options)

        return method


def guard_of(comm: Comm, config: Config, parts: PretrainParts) -> AnomalyMonitor:
    return AnomalyMonitor(comm, parts.device, config.health, [parts.grad_norm_guard])


def count_waits(comm: Comm, config: Config, stage: str) -> Counter[str]:
    """Of one step that is not reported, with what the loop does around it; after two steps that set things up."""
    waits = stream_stand_in.install()
    given = json.loads((ranks.DEEPSPEED / f"{stage}.json").read_text())
    if stage == "zero3_hpz":
        given["zero_optimization"]["zero_hpz_partition_size"] = 2
    parts = build_pretraining(config, complete_ds_config(given, config, comm.world_size), comm)
    _, centres = ranks.run_steps(parts, config, comm, 0, 2)
    meter, guard = StepMeter(comm, config.optim.steps, config.batch.clip), guard_of(comm, config, parts)
    batch = random_batch(config, 2, comm.rank, comm.world_size)
    waits.clear()
    with HostReads() as reads:
        record = train_step(parts, batch, centres, config)
        meter.add(record)
        guard.watch(record.losses["total"])
    seen = reads.seen + waits
    assert meter.read(3, 0.0)["loss/total"] > 0
    return Counter({name: count for name, count in seen.items() if not name.endswith(BOUNDS)})


EVERYTHING = ("optim.precision=bf16", "model.trunk.drop_path=0.4", "system.activation_checkpointing=selective")
EVERYTHING += ("system.checks.shares_every=1",)


@pytest.mark.L1
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("zero3", ()),
        ("zero3", (*EVERYTHING, "objectives.ssl.targets=centering")),
        ("zero3_hpz", ()),
        ("zero2", EVERYTHING[:1]),
        ("zero2", ("health.spike=skip", "health.nonfinite=skip")),
    ],
)
def test_a_step_between_reports_waits_for_nothing(stage: str, overrides: tuple[str, ...]) -> None:
    for seen in run_ranks(count_waits, 2, tiny_config(*overrides), stage):
        assert seen == {}


@pytest.mark.L1
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_nor_does_a_step_of_a_lone_rank(stage: str) -> None:
    assert run_ranks(count_waits, 1, tiny_config(*EVERYTHING[:1]), stage) == [{}]


def mark_copies(computes: Stream, marks: Counter[Stream]) -> None:
    """Marks where the copies are written that a host keeps of what it gathered."""
    write = Init._partition_param_sec

    @functools.wraps(write)
    def marked(init: Any, param: Any, buffer: Any = None, has_been_updated: bool = False) -> None:
        is_there = param.ds_secondary_tensor is not None and not has_been_updated
        computes.work()
        write(init, param, buffer, has_been_updated)
        if not is_there:
            marks[computes] = computes.seen[computes]

    Init._partition_param_sec = marked


def order_of_streams(comm: Comm, stage: str) -> Counter[str]:
    """How often something is queued that needs what an earlier stream does and has not waited for it; of three steps
    with five buckets and more."""
    stream_stand_in.install()
    config, computes, shards = tiny_config(), Stream.current[0], Counter[Stream]()
    given = json.loads((ranks.DEEPSPEED / f"{stage}.json").read_text())
    given["zero_optimization"]["reduce_bucket_size"] = 5000
    if stage == "zero3_hpz":
        # All is let go after forward and gathered again in backward, from the copies.
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        given["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits} | {"zero_hpz_partition_size": 2}
        mark_copies(computes, shards)
    parts = build_pretraining(config, complete_ds_config(given, config, comm.world_size), comm)
    assert parts.teacher is not None
    zero, backend = parts.engine.optimizer, deepspeed.comm.comm.cdb
    reduces = zero.reduction_stream if stage == "zero2" else zero.reduce_and_partition_stream
    found, gradients = Counter[str](), Counter[Stream]()

    def written(owner: Any, method: str, marks: Counter[Stream]) -> None:
        call = getattr(owner, method)

        def queued(*arguments: Any, **options: Any) -> Any:
            computes.work()
            result = call(*arguments, **options)
            marks[computes] = computes.seen[computes]
            return result

        setattr(owner, method, queued)

    def read(owner: Any, method: str, what: str, after: Counter[Stream]) -> None:
        call = getattr(owner, method)

        def checked(*arguments: Any, **options: Any) -> Any:
            found[what] += 1
            found[f"{what} too early"] += not after <= Stream.current[-1].seen
            return call(*arguments, **options)

        setattr(owner, method, checked)

    written(zero, "reduce_independent_p_g_buckets_and_remove_grads", gradients)
    written(zero.optimizer, "step", shards)
    written(parts.teacher, "update", shards)
    read(zero, "get_grad_norm_direct", "norm", reduces.seen)
    read(backend, "all_reduce" if stage == "zero2" else "reduce_scatter_function", "reduction", gradients)
    read(backend, "all_gather_function", "gather", shards)
    ranks.run_steps(parts, config, comm, 0, 3)
    return found


@pytest.mark.L1
@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero3_hpz"])
def test_streams_wait_for_each_other_where_the_host_does_not(stage: str) -> None:
    for found in run_ranks(order_of_streams, 2, stage):
        assert found["reduction"] > 15
        assert found["gather"] > 15 or stage == "zero2"
        assert not any(count for what, count in found.items() if what.endswith("too early")), found


@pytest.mark.L1
def test_other_optimizers_wait_once_a_step_for_deepspeeds_finite_check() -> None:
    config = tiny_config("system.optimizer=torch", "health.spike=skip")
    for seen in run_ranks(count_waits, 2, config, "zero3"):
        # torch's plain AdamW reads its step count as well, once a group; that tensor lives on the host.
        assert seen.pop("_local_scalar_dense in zero/stage3.py:step_with_gradscaler") == 2
        assert seen == {"_local_scalar_dense in zero/optimizer.py:ask": 1}


def syncs_of_a_step(comm: Comm, stage: str) -> list[str]:
    """What makes the host wait for CUDA in one step that is not reported."""
    config = tiny_config("optim.precision=bf16", "system.compile=off")
    parts = ranks.build(config, comm, stage)
    _, centres = ranks.run_steps(parts, config, comm, 0, 2)
    batch = random_batch(config, 2, comm.rank, comm.world_size).pinned()
    with waits_of_host() as waits:
        train_step(parts, batch, centres, config)
    return [place for place in waits if not place.endswith(BOUNDS)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_cuda_sees_no_sync_in_a_step(stage: str) -> None:
    assert run_ranks(syncs_of_a_step, 1, stage) == [[]]
