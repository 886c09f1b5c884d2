"""A report names the rank that holds the most memory, and how far the others are from it."""

from __future__ import annotations

import pytest
import torch

from engine import distributed
from engine.reporting.instruments import memory_of_ranks, memory_spread
from model.losses.comm import Comm, Solo
from profiling.instruments.memory import peak_and_current_bytes
from tests.harness import run_ranks

HELD_BYTES = 512 * 2**20


def with_more_on_rank_1(comm: Comm) -> tuple[dict[str, float], list[tuple[str, int]]]:
    kept, sent = torch.ones(HELD_BYTES if comm.rank == 1 else 1, dtype=torch.uint8), []
    with distributed.observe_collectives(lambda kind, num_bytes: sent.append((kind, num_bytes))):
        values = memory_of_ranks(comm)
    assert len(kept)
    return values, sent


@pytest.mark.L1
def test_the_rank_with_the_most_memory_is_named_on_every_rank() -> None:
    (first, sent), (second, _) = run_ranks(with_more_on_rank_1, 2)
    assert first == second
    assert sent == [("all_reduce", 8 * 2 * len(peak_and_current_bytes()))], "float64, a rank and figure"
    for name in ("peak", "now"):
        assert first[f"memory/{name}_rank"] == 1.0
        apart = first[f"memory/{name}_max_gib"] - first[f"memory/{name}_min_gib"]
        assert apart == pytest.approx(HELD_BYTES / 2**30, rel=0.2)  # libraries take what they take: 0.500 seen


@pytest.mark.L0
def test_a_spread_is_least_mean_most_and_whose() -> None:
    expected = {"memory/peak_min_gib": 1.0, "memory/peak_mean_gib": 2.0, "memory/peak_max_gib": 3.0}
    assert memory_spread("peak", [2.0, 3.0, 1.0]) == expected | {"memory/peak_rank": 1.0}


@pytest.mark.L0
def test_one_rank_reports_what_it_holds() -> None:
    held = peak_and_current_bytes()
    values = memory_of_ranks(Solo())
    assert set(values) == {
        f"memory/{name}_{key}" for name in held for key in ("min_gib", "mean_gib", "max_gib", "rank")
    }
    assert values["memory/peak_max_gib"] >= held["peak"] / 2**30 > 0
    if torch.cuda.is_available():
        assert held["now"] <= held["peak"] <= held["reserved"]
