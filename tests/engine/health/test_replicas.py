"""One flipped bit on one rank is found, and named by parameter and rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine import zero
from engine.ema import CentreState
from engine.health.anomalies import TrainingFailed
from engine.health.replicas import check_replicas, digest
from engine.tasks.task import TrainState
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

KINDS = {torch.float32: 32, torch.bfloat16: 16, torch.int64: 64, torch.uint8: 8}


def flip(values: Tensor, place: int, bit: int) -> None:
    """In place; again: back."""
    view = values.view(torch.uint8)
    view.view(-1)[place * values.element_size() + bit // 8] ^= 1 << bit % 8


@pytest.mark.L0
@given(st.sampled_from(sorted(KINDS, key=str)), st.integers(1, 300), st.data())
def test_a_flipped_bit_or_another_order_changes_the_digest(kind: torch.dtype, length: int, data: st.DataObject) -> None:
    values = torch.arange(length).to(kind)
    before = digest(values)
    place, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, KINDS[kind] - 1))
    flip(values, place, bit)
    assert digest(values) != before
    flip(values, place, bit)
    assert digest(values) == before
    swapped = values.roll(1)
    assert (digest(swapped) == before) == torch.equal(swapped, values)


@pytest.mark.L0
def test_the_last_of_several_chunks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.health.replicas._CHUNK", 8)
    values = torch.zeros(20)
    before = digest(values)
    for place in range(20):
        flip(values, place, 31)  # -0.0, which equals 0.0
        assert digest(values) != before
        flip(values, place, 31)


def said(kept: TrainState, comm: Comm) -> str:
    try:
        check_replicas(kept, comm, 2)
    except TrainingFailed as error:
        return f"{error.kind}: {error}"
    return "nothing"


def told_of_flips(comm: Comm, stage: str) -> dict[str, str]:
    """What is said when rank 1's bit is flipped, by what it was flipped in."""
    config = tiny_config(
        "optim.precision=bf16", "objectives.ssl.targets=centering", "health.spike=skip", "optim.steps=20"
    )
    parts = ranks.build(config, comm, stage)
    _, centres = ranks.run_steps(parts, config, comm, 0, 2)
    kept = parts.train_state(CentreState(centres))
    check_replicas(kept, comm, 2)
    assert parts.teacher is not None
    assert centres is not None
    assert parts.grad_norm_guard.recent is not None
    pair = parts.teacher.shards[3]
    places = {
        "weight": dict(zero.replicated_tensors(parts.engine)).get("trunk.blocks.0.norm1.weight"),
        "shard": zero.shard(pair.student),
        "average": pair.average,
        "centre": centres.patch_K,
        "window": parts.grad_norm_guard.recent,
    }
    told = {}
    for name, tensor in places.items():
        assert tensor is not None, "small enough to stay gathered"
        bit = 30 if name == "average" else 1  # what rounding hides is not seen
        if comm.rank == 1:
            flip(tensor, 0, bit)
        told[name] = said(kept, comm)
        if comm.rank == 1:
            flip(tensor, 0, bit)
    check_replicas(kept, comm, 2)
    return told


@pytest.mark.L1
@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_a_flipped_bit_in_one_ranks_copy_is_named(stage: str) -> None:
    told, other = run_ranks(told_of_flips, 3, stage)[:2]
    assert told == other
    assert "model: trunk.blocks.0.norm1.weight differs on rank 1" in told["weight"]
    assert all(words.startswith("replicas: at step 2 ranks hold different") for words in told.values())
    assert "or the others do" not in told["weight"]
    assert "patch_K differs on rank 1" in told["centre"]
    assert "recent norms of model differs on rank 1" in told["window"]
    stray = "is not its fp32 master on rank 1"
    if stage == "zero3":
        assert stray in told["shard"]
        assert stray in told["average"]
    else:
        assert "differs on rank 1" in told["shard"]
        assert "average of teacher." in told["average"]
        assert "differs on rank 1" in told["average"]
