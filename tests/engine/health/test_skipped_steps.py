"""A step that is left out leaves weights, moments and their count alone, whoever computes it; the run goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import zero
from engine.build import PretrainParts
from engine.checkpoint.tensor_ranges import MASTER, MOMENTS
from engine.step import train_step
from model.losses.comm import Comm
from tests.engine import ranks
from tests.engine.health.runs import Spoilt
from tests.harness import run_ranks
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.L1

CASES = [  # every way DeepSpeed comes to its decision: stage, precision, optimizer
    ("zero3", "bf16", "torch_fused"), ("zero3", "fp32", "torch"), ("zero2", "fp32", "torch_fused"),
    ("zero2", "bf16", "torch"), ("zero1", "bf16", "torch_fused"), ("zero1", "fp32", "torch"),
]  # fmt: skip


def after_bad_steps(comm: Comm, stage: str, precision: str, optimizer: str) -> dict[str, Any]:
    """Five steps, one on pictures that are no numbers and one on huge ones, on rank 1 alone; then a good one."""
    config = tiny_config(
        f"optim.precision={precision}", f"system.optimizer={optimizer}", "objectives.ssl.targets=centering",
        "objectives.rec.l2=1", "optim.steps=20", "health.nonfinite=skip", "health.spike=skip", "health.spike_window=4",
    )  # fmt: skip
    parts = ranks.build(config, comm, stage)
    _, centres = ranks.run_steps(parts, config, comm, 0, 5)
    found: dict[str, Any] = {"changed": [], "steps": []}
    spoilt = Spoilt({5: "nan", 6: "huge"})
    for step in (5, 6, 7):
        before = state(parts)
        batch = random_batch(config, step, comm.rank, comm.world_size)
        batch = replace(batch, images=spoilt.spoil(batch.images, step, comm.rank))
        centres = train_step(parts, batch, centres, config).centres
        after = state(parts)
        found["changed"].append(sum(not torch.equal(before[name], after[name]) for name in before) / len(before))
        found["steps"].append(zero.steps_taken(parts.engine))
    assert centres is not None
    finite = torch.isfinite(torch.cat([*state(parts).values(), centres.cls_K, centres.patch_K]))
    return found | {"counts": parts.grad_norm_guard.counts.tolist(), "is_finite": bool(finite.all())}


def state(parts: PretrainParts) -> dict[str, Tensor]:
    """This rank's weights and moments."""
    return {
        f"{key}/{fragment.name}": fragment.read(key).flatten().clone()
        for fragment in zero.fragments(parts.engine)
        for key in (MASTER, *MOMENTS)
    }


def every_case(comm: Comm) -> list[dict[str, Any]]:
    return [after_bad_steps(comm, *case) for case in CASES]


def test_no_number_and_a_spike_on_one_rank_are_left_out_on_all() -> None:
    for found in itertools.chain(*run_ranks(every_case, 2)):
        assert found["steps"] == [5, 5, 6]
        assert found["changed"][:2] == [0, 0]
        assert found["changed"][2] > 0.9, "the step after them was taken"
        assert found["counts"] == [1, 1]
        assert found["is_finite"], "the centres too"
