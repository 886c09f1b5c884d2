"""Between two reports nobody asks the device for a number: a step is queued while the one before still runs."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config
from engine.assemble import Assembly
from engine.health.guard import Guard
from engine.report.meter import Meter
from engine.step import train_step
from model.objectives.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import random_batch, tiny_config

# What ends on the host: a number read, or a shape that depends on one.
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave")
METHODS = ("cpu", "tolist", "numpy")  # torch does not dispatch them for a tensor that is on the CPU already
ON_HOST = "model/captions.py:pack_captions"  # reads the captions as the loader gave them: they never were elsewhere


class HostReads(TorchDispatchMode):
    """Counts, by who asked, whatever would wait for a GPU if the tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
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
            self.seen[f"{name} in {_asker()}"] += 1
        return operator(*arguments, **(options or {}))

    def _counted(self, name: str) -> Any:
        def method(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if _asker() != ON_HOST:
                self.seen[f"{name} in {_asker()}"] += 1
            return self.plain[name](tensor, *arguments, **options)

        return method


def _asker() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].name}"


def guard_of(comm: Comm, config: Config, parts: Assembly) -> Guard:
    return Guard(comm, parts.device, config.health, [parts.judge])


def count_reads(comm: Comm, config: Config, stage: str) -> Counter[str]:
    """Of one step that is not reported, with what the loop does around it; after two steps that set things up."""
    parts = ranks.build(config, comm, stage)
    _, centres = ranks.run_steps(parts, config, comm, 0, 2)
    meter, guard = Meter(comm, config.optim.steps, config.batch.clip), guard_of(comm, config, parts)
    batch = random_batch(config, 2, comm.rank, comm.world_size)
    with HostReads() as reads:
        record = train_step(parts, batch, centres, config)
        meter.add(record)
        guard.watch(record.losses["total"])
    assert meter.read(3, 0.0)["loss/total"] > 0
    return reads.seen


EVERYTHING = ("optim.precision=bf16", "model.trunk.drop_path=0.4", "system.activation_checkpointing=selective")
EVERYTHING += ("system.checks.shares_every=1",)


@pytest.mark.L1
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("zero3", ()),
        ("zero3", (*EVERYTHING, "objectives.ssl.targets=centering")),
        ("zero2", EVERYTHING[:1]),
        ("zero2", ("health.spike=skip", "health.nonfinite=skip")),
    ],
)
def test_a_step_between_reports_reads_nothing_back(stage: str, overrides: tuple[str, ...]) -> None:
    for seen in run_ranks(count_reads, 2, tiny_config(*overrides), stage):
        assert seen == {}


@pytest.mark.L1
def test_other_optimizers_wait_once_a_step_for_deepspeeds_finite_check() -> None:
    config = tiny_config("system.optimizer=torch", "health.spike=skip")
    for seen in run_ranks(count_reads, 2, config, "zero3"):
        # torch's plain AdamW reads its step count as well, once a group; that tensor lives on the host.
        assert seen.pop("_local_scalar_dense in zero/stage3.py:step_with_gradscaler") == 2
        assert seen == {"_local_scalar_dense in zero/optimizer.py:ask": 1}


def syncs_of_a_step(comm: Comm) -> list[str]:
    """Which files make CUDA wait, in one step that is not reported."""
    config = tiny_config("optim.precision=bf16", "system.compile=off")
    parts = ranks.build(config, comm, "zero3")
    _, centres = ranks.run_steps(parts, config, comm, 0, 2)
    batch = random_batch(config, 2, comm.rank, comm.world_size)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(parts, batch, centres, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchronizing" in str(warning.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_no_sync_in_a_step_but_deepspeeds_own() -> None:
    [places] = run_ranks(syncs_of_a_step, 1)
    assert [place for place in places if "deepspeed/" not in place] == []
