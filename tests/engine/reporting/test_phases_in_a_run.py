"""A run says where a step's time goes, and which rank holds the others up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from configs import Config
from engine.reporting.phase_timing import phase_times, straggler
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

ALWAYS = {
    "inputs",
    "trunk",
    "objectives",
    "backward",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "optimizer",
    "other",
}
NO_SSL = ("objectives.ssl.weight=0", "batch.ssl=0")
SLEEP_SECONDS = 0.4


def timed_steps(comm: Comm, config: Config, stage: str) -> tuple[dict[str, float], float]:
    """What a report says of two steps, and what one took by the clock on the wall."""
    parts = ranks.build(config, comm, stage)
    ranks.run_steps(parts, config, comm, 0, 1)
    parts.phases.read()
    begin = time.perf_counter()
    ranks.run_steps(parts, config, comm, 1, 3)
    return phase_times(parts.phases, comm), 500 * (time.perf_counter() - begin)


def phases_of(values: dict[str, float]) -> set[str]:
    return {name.removeprefix("phase/").removesuffix("_ms") for name in values if name.startswith("phase/")}


@pytest.mark.L1
@pytest.mark.parametrize(
    ("stage", "overrides", "parts"),
    [
        ("zero3", (), {"teacher", "ema", "text", "heads", "decoder"}),
        ("zero3", ("data.streams=2", "batch.rec=4", "system.clip.micro_batches=3"),
         {"teacher", "ema", "text", "heads", "decoder"}),
        ("zero2", (*NO_SSL, "objectives.clip.weight=0"), {"heads", "decoder"}),
        ("zero1", (*NO_SSL, "objectives.rec.weight=0", "batch.rec=0"), {"text", "heads"}),
    ],
)  # fmt: skip
def test_a_step_is_the_sum_of_the_phases_its_config_has(
    stage: str, overrides: tuple[str, ...], parts: set[str]
) -> None:
    first, second = run_ranks(timed_steps, 2, tiny_config(*overrides), stage)
    # ZeRO-1 and 2 fetch no parameters; without a contrastive loss nothing else is gathered.
    absent = {"all_gather"} if "objectives.clip.weight=0" in overrides else set()
    assert phases_of(first[0]) == (ALWAYS | parts) - absent
    assert first[0] == second[0]
    sums = sum(value for name, value in first[0].items() if name.startswith("phase/"))
    assert sums == pytest.approx((first[1] + second[1]) / 2, rel=0.2)  # not all of the walls' clock: the read itself
    assert min(first[0].values()) >= 0


def slow_rank(comm: Comm, config: Config) -> dict[str, float]:
    """Two steps in which the trunk of rank 1 sleeps, and nobody else."""
    parts = ranks.build(config, comm, "zero3")
    ranks.run_steps(parts, config, comm, 0, 1)

    def sleep(*_: Any) -> None:
        time.sleep(SLEEP_SECONDS if comm.rank == 1 else 0)

    parts.engine.module.trunk.register_forward_pre_hook(sleep)
    parts.phases.read()
    ranks.run_steps(parts, config, comm, 1, 3)
    return phase_times(parts.phases, comm)


@pytest.mark.L1
def test_the_rank_that_holds_the_others_up_is_named() -> None:
    for values in run_ranks(slow_rank, 2, tiny_config()):
        step_ms = sum(value for name, value in values.items() if name.startswith("phase/"))
        assert values["straggler/rank"] == 1.0
        excess_ms = values["straggler/excess_share"] * step_ms
        assert excess_ms > 500 * SLEEP_SECONDS
        # The other rank stood still in a collective for as long: half of that is the mean over ranks.
        assert values["phase/all_gather_ms"] + values["phase/all_reduce_ms"] > 300 * SLEEP_SECONDS


@pytest.mark.L0
def test_the_excess_is_over_the_median_rank() -> None:
    assert straggler([80.0, 100.0], 125.0) == {"straggler/rank": 1.0, "straggler/excess_share": 0.16}
    assert straggler([50.0, 40.0, 10.0], 100.0) == {"straggler/rank": 0.0, "straggler/excess_share": 0.1}
    assert straggler([7.0], 10.0) == {"straggler/rank": 0.0, "straggler/excess_share": 0.0}


def off(comm: Comm, config: Config) -> tuple[dict[str, float], bool]:
    parts = ranks.build(config, comm, "zero3")
    ranks.run_steps(parts, config, comm, 0, 1)
    return phase_times(parts.phases, comm), "backward" in vars(parts.engine)


@pytest.mark.L1
def test_switched_off_nothing_is_timed_or_wrapped() -> None:
    assert run_ranks(off, 1, tiny_config("system.phases=false")) == [({}, False)]
