"""The predicted peak of a step is what real engines take."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from configs import Config
from configs.deepspeed import load_ds_config
from engine.build import build_pretraining
from engine.step import train_step
from model.losses.comm import Comm
from profiling.cost.peak_memory import predict_peak
from profiling.instruments.memory import peak_bytes, tensor_bytes
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import random_batch, tiny_config

DEEP = ("batch.clip=24", "batch.ssl=12", "model.trunk.width=64", "model.prototypes.num=512", "system.compile=off",
        *(f"model.{tower}.depth=4" for tower in ("trunk", "text", "decoder")))  # fmt: skip
CASES = {
    "zero3": ("zero3", "optim.precision=bf16"),
    "zero3, parts": ("zero3", "optim.precision=bf16", "system.clip.micro_batches=2"),
    "zero3, full": ("zero3", "system.activation_checkpointing=full", "batch.clip=12"),
    "zero3, disturbed": (
        "zero3", "optim.precision=bf16", "objectives.rec.mask=[0.25,0.25]", "model.latent=gaussian",
        "objectives.rec.noise.kind=interpolative",
    ),
    "zero2, selective": ("zero2", "optim.precision=bf16", "system.activation_checkpointing=selective"),
    "zero1, few rows": ("zero1", "system.activation_checkpointing=full", "batch.clip=6", "batch.ssl=6"),
}  # fmt: skip
STEP = 2  # the first steps teach ZeRO-3 its order and make the moments


def case(name: str, world_size: int) -> tuple[Config, dict[str, Any]]:
    """With a bucket that a step fills several times."""
    stage, *overrides = CASES[name]
    config = tiny_config(*DEEP, *overrides)
    ds_config = load_ds_config(ranks.DEEPSPEED / f"{stage}.json", config, world_size)
    return config, {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], "reduce_bucket_size": 100_000}}


def measured(comm: Comm, names: list[str]) -> dict[str, int]:
    """What an engine holds between steps, and the most that a step adds; every case in an engine of its own."""
    return {name: _peak(comm, *case(name, comm.world_size)) for name in names}


def _peak(comm: Comm, config: Config, ds_config: dict[str, Any]) -> int:
    before = tensor_bytes()
    parts = build_pretraining(config, ds_config, comm)
    ranks.run_steps(parts, config, comm, 0, STEP)
    held = sum(size for address, size in tensor_bytes().items() if address not in before)
    batch = random_batch(config, STEP, comm.rank, comm.world_size)
    gc.disable()
    added = peak_bytes(lambda: train_step(parts, batch, parts.centres, config))
    gc.enable()
    return held + added


@pytest.mark.L1
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's counter")
@pytest.mark.parametrize(
    ("world_size", "names"),
    [(1, ["zero3", "zero1, few rows"]), (2, ["zero3, parts", "zero3, disturbed", "zero3, full", "zero2, selective"])],
)
def test_the_peak_of_a_step_is_what_was_predicted(world_size: int, names: list[str]) -> None:
    found = run_ranks(measured, world_size, names)[0]
    predicted = {}
    for name in names:
        config, ds_config = case(name, world_size)
        batch = random_batch(config, STEP, 0, world_size)
        predicted[name] = predict_peak(config, ds_config, world_size, _attention(config), batch=batch).device_bytes
    # Worst seen 4.0 % (parts: ZeRO-3 gathers less at once than when one trace serves all forwards), others 1.0 %.
    assert predicted == pytest.approx(found, rel=0.05)


def _attention(config: Config) -> str:
    """What `auto` is on CPU."""
    return "matmul" if config.optim.precision == "bf16" else "sdpa"


@pytest.mark.L0
def test_a_peak_is_states_and_named_parts_of_a_step() -> None:
    config, ds_config = case("zero3, parts", 2)
    footprint = predict_peak(config, ds_config, 2)
    names = [each.name for each in footprint.components]
    assert names[:3] == ["parameters", "frozen teacher", "optimizer"]
    assert {"activations: trunk", "gathered parameters"} <= set(names)
    assert footprint.device_bytes > 1.5 * footprint.static_bytes
    assert "while a step runs" in footprint.table()
