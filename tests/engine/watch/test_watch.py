"""Ranks of a real group: one dies, is stopped, hangs, fails; the others know who, and where it was."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from configs import Config
from engine import failures, world
from engine.watch import watch
from model.objectives.comm import Comm
from profiling.phases import HostClock, Phases
from tests.harness import RanksFailed, run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1

QUICK = ("system.watch.silent_seconds=2", "system.watch.stuck_seconds=5")


def run_until(comm: Comm, config: Config, run_dir: Path, fate: str) -> str:
    """Two ranks make steps; after the third, rank 1 meets its fate while rank 0 waits for it in a collective."""
    phases = Phases(HostClock())
    with watch.watched(config, run_dir, phases) as place:
        for step in range(1, 6):
            if step == 4 and comm.rank == 1:
                meet(fate, run_dir)
            time.sleep(0.6)  # more than a beat, which comes every quarter of silent_seconds
            with phases("all_reduce"):
                world.barrier()
            place.step = step
    return "ended well"


def meet(fate: str, run_dir: Path) -> None:
    (run_dir / "pid").write_text(str(os.getpid()))
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fate == "hanging":
        time.sleep(60)
    elif fate == "failing":
        raise ValueError("of its own")


def test_a_run_without_trouble_ends_well_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(run_until, 3, tiny_config(*QUICK), tmp_path, "none") == ["ended well"] * 3
    assert failures.last(tmp_path) is None


@pytest.mark.parametrize(
    ("fate", "kind", "words"),
    [
        ("killed", "dead", "its process has ended without a word"),
        ("stopped", "silent", "not heard of for 2 s"),
        ("hanging", "stuck", "no rank has finished a step for 5 s"),
    ],
)
def test_a_lost_rank_is_named_by_the_others_with_step_and_phase(
    tmp_path: Path, fate: str, kind: str, words: str
) -> None:
    with pytest.raises(RanksFailed):
        run_ranks(run_until, 2, tiny_config(*QUICK), tmp_path, fate, timeout=30)
    failure = failures.last(tmp_path)
    assert failure is not None
    assert (failure.kind, failure.rank) == (kind, 1)
    assert failure.step in (2, 3), "as it last said, a beat ago"
    assert words in failure.message
    assert "rank 0 " in failure.message
    assert ("after step 3 in all_reduce" in failure.message) == (fate != "killed")
    assert len((tmp_path / failures.FILE).read_text().splitlines()) == 1


def test_a_rank_that_fails_says_so_and_the_others_end_for_it(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="ValueError: of its own"):
        run_ranks(run_until, 2, tiny_config(*QUICK), tmp_path, "failing", timeout=30)
    lines = [json.loads(line) for line in (tmp_path / failures.FILE).read_text().splitlines()]
    assert [(line["kind"], line["rank"]) for line in lines] == [("ValueError", 1), ("failed", 1)]
    assert lines[1]["message"].endswith("ValueError: of its own")
