"""Bytes between ranks are counted as sent. tests/profiling/test_communication.py counts those of real steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from engine import distributed
from engine.reporting.instruments import CollectiveTraffic

pytestmark = pytest.mark.L0


def test_a_report_gives_megabytes_a_step_and_starts_anew() -> None:
    traffic = CollectiveTraffic()
    traffic.note("all_gather", 3_000_000)
    traffic.note("all_gather", 1_000_000)
    traffic.note("broadcast", 8)
    assert traffic.calls["all_gather"] == 2
    assert traffic.take(2) == {"comm/all_gather_mb": 2.0, "comm/reduce_scatter_mb": 0.0, "comm/all_reduce_mb": 0.0}
    assert set(traffic.take(1).values()) == {0.0}


def test_the_message_is_the_larger_of_input_and_output() -> None:
    noted: list[tuple[str, int]] = []

    def collective(*tensors: torch.Tensor, op: str = "sum") -> str:
        return f"{op} of {len(tensors)}"

    told = distributed.observing(collective, "reduce_scatter", lambda kind, size: noted.append((kind, size)))
    assert told(torch.zeros(4), torch.zeros(8, dtype=torch.bfloat16), op="max") == "max of 2"
    assert told(torch.zeros(3)) == "sum of 1"
    assert noted == [("reduce_scatter", 16), ("reduce_scatter", 12)]


def test_observing_ends_with_its_block_though_the_block_raises() -> None:
    before = dist.all_reduce
    during = []

    def fails() -> None:
        with distributed.observe_collectives(lambda kind, size: None):
            during.append(dist.all_reduce)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert during[0] is not before
    assert dist.all_reduce is before
