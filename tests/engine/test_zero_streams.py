"""What replaces DeepSpeed's waits computes what DeepSpeed computes, and refuses a DeepSpeed it does not know."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from configs import UserError
from configs.deepspeed import complete_ds_config
from engine.build import build_pretraining
from engine.zero import streams
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

SHAPES = ((1,), (3,), (384,), (1000,), (64, 96), (7, 13, 5), (4097,), (300, 301))


def a_rank_of_one() -> Any:
    """What the two functions ask of a ZeRO optimizer, and what DeepSpeed's ask beside."""

    def nothing(*_: Any, **__: Any) -> None: ...

    return SimpleNamespace(
        device="cpu", model_parallel_rank=0, dp_process_group=None, _model_parallel_all_reduce=nothing,
        _assert_same_partition_group=nothing, _get_param_partition_group=nothing, _autoep_expert_parallel_group=nothing,
        _grad_norm_counts_every_rank=lambda *_: True,
    )  # fmt: skip


def gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [*found, found[-1].view(-1).narrow(0, 17, 4001), found[4].t()]


@pytest.mark.L0
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_norms_are_deepspeeds_bit_for_bit(
    dtype: torch.dtype, value: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed.comm, "all_reduce", lambda *_, **__: None)
    found, zero = gradients(dtype), a_rank_of_one()
    if value is not None:
        found[2][7] = value
    for owner, norm in ((streams.FLAT, streams._norm_of_partition), (streams.SHARDED, streams._norm_of_shards)):
        expected = owner.get_grad_norm_direct(zero, found, found)
        ours = norm(zero, found, found)
        assert (ours.dtype, ours.item()) == (expected.dtype, expected.item())
        assert (ours.item() == -1) == (value is not None)


@pytest.mark.L0
def test_padding_of_a_partition_is_not_in_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.comm, "all_reduce", lambda *_, **__: None)
    padding, own, rest = torch.ones(8), torch.full((4,), 3.0), torch.ones(16)
    padding._zero_padding = True  # type: ignore[attr-defined]
    for norm in (streams._norm_of_partition, streams.FLAT.get_grad_norm_direct):
        assert norm(a_rank_of_one(), [padding, own, rest], [own]).item() == 6.0
        assert norm(a_rank_of_one(), [padding], []).item() == 0.0


@pytest.mark.L0
def test_another_deepspeed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.check_known()

    def allreduce_and_copy(self: Any) -> None:
        """Of a later version."""

    monkeypatch.setattr(streams.FLAT, "allreduce_and_copy", allreduce_and_copy)
    streams.source_digest.cache_clear()
    with pytest.raises(UserError, match=r"DeepSpeedZeroOptimizer\.allreduce_and_copy is not the code of 0\.19\.8"):
        streams.check_known()
    monkeypatch.undo()
    streams.source_digest.cache_clear()


@pytest.mark.L0
def test_an_answer_of_the_accelerator_is_taken_back() -> None:
    accelerator = get_accelerator()

    def fail() -> None:
        with streams._overriding_accelerator(resolves_data_dependency=lambda: "inner"):
            assert accelerator.resolves_data_dependency() == "inner"
            raise KeyError

    with streams._overriding_accelerator(resolves_data_dependency=lambda: "outer"):
        with pytest.raises(KeyError):
            fail()
        assert accelerator.resolves_data_dependency() == "outer"
    assert "resolves_data_dependency" not in vars(accelerator)


def with_and_without_overlap(comm: Comm, stage: str) -> list[ranks.Trained]:
    """Three steps with buckets of 5,000 elements."""
    config, found = tiny_config(), []
    for is_on in (True, False):
        given = json.loads((ranks.DEEPSPEED / f"{stage}.json").read_text())
        given["zero_optimization"] |= {"overlap_comm": is_on, "reduce_bucket_size": 5000}
        parts = build_pretraining(config, complete_ds_config(given, config, comm.world_size), comm)
        found.append(ranks.outcome(parts, ranks.run_steps(parts, config, comm, 0, 3)[0]))
    return found


@pytest.mark.L1
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_lone_rank_that_reduces_nothing_takes_the_same_steps(stage: str) -> None:
    [(reduced, left)] = run_ranks(with_and_without_overlap, 1, stage)
    assert left.losses == reduced.losses
    assert all(torch.equal(weight, reduced.weights[name]) for name, weight in left.weights.items())


@pytest.mark.L0
def test_a_lone_rank_s_bucket_is_rounded_where_it_would_be_sent_in_another_type() -> None:
    averaged: list[torch.dtype] = []
    for sent in (torch.bfloat16, torch.float16):
        streams._average_of_one(lambda _, dtype: averaged.append(dtype), torch.ones(3, dtype=torch.bfloat16), sent)
    assert averaged == [torch.float16]
