"""How long a collective of DeepSpeed's own groups waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1


def minutes_of_groups(comm: Comm, stage: str) -> list[float]:
    """Of every group but the one of distributed.start, once an engine stands."""
    ranks.build(tiny_config("system.timeout_minutes=7"), comm, stage)
    made = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in made]
    return [timeout.total_seconds() / 60 for timeout in timeouts]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_groups_that_deepspeed_makes_wait_as_long_as_the_run_says(stage: str) -> None:
    for minutes in run_ranks(minutes_of_groups, 2, stage):
        assert minutes
        assert set(minutes) == {7.0}, "torch's default is 30 over gloo, 10 over NCCL"
