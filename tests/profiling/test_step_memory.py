"""The memory bench runs an engine and says what it took."""

from __future__ import annotations

from typing import Any

import pytest

from profiling.benches.predictions import MemoryCase, bench_step_memory
from profiling.benches.recorder import BenchRecorder

TOWERS = tuple(
    f"model.{tower}.{name}={value}"
    for tower in ("trunk", "text", "decoder")
    for name, value in (("width", 64), ("depth", 1), ("heads", 2))
)
SMALL = ("views.image_size=64", "views.global_size=64", "views.local_size=32", "optim.precision=fp32", *TOWERS)


@pytest.mark.L1
def test_the_memory_bench_runs_small() -> None:
    recorder = BenchRecorder(rounds=1)
    bench_step_memory(recorder, cases=(MemoryCase("zero3", 1, SMALL),))
    (peaks,) = recorder.results
    (row,) = peaks.as_dict()["rows"]
    assert 0.9 < row["ratio"] < 1.1
    assert row["resident"] > 2**20
    assert row["case"].startswith("zero3, 1 rank, views.image_size=64")
    assert peaks.as_table().row_count == 1


@pytest.mark.L0
def test_cases_are_named_by_what_differs() -> None:
    names: list[Any] = [str(MemoryCase("zero2", 2)), str(MemoryCase("zero3", 2, ("system.clip.micro_batches=2",)))]
    assert names == ["zero2, 2 ranks", "zero3, 2 ranks, clip.micro_batches=2"]
