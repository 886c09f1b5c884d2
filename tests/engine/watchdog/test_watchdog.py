"""Ranks of a real group: one dies, is stopped, hangs, fails; the others know who, and where it was."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs import Config, UserError
from engine import distributed, exits, trainer
from engine.health.anomalies import TrainingFailed
from engine.watchdog import client
from model.losses.comm import Comm
from profiling.instruments.phases import HostClock, PhaseTimer
from tests.engine.small_runs import wait_until
from tests.harness import RanksFailed, run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1

QUICK = ("system.watch.silent_seconds=2", "system.watch.stuck_seconds=5")


def run_until(comm: Comm, config: Config, run_dir: Path, fate: str, lost: int = 1) -> str:
    """Two ranks make steps; after the third, one meets its fate while the other waits for it in a collective."""
    phases = PhaseTimer(HostClock())
    with client.watchdog(config, run_dir) as place:
        place.follow_phases(phases)
        for step in range(1, 6):
            if step == 4 and comm.rank == lost:
                meet(fate, run_dir)
            time.sleep(0.6)  # more than a beat, which comes every quarter of silent_seconds
            with phases("all_reduce"):
                distributed.barrier()
            place.step = step
    return "ended well"


def meet(fate: str, run_dir: Path) -> None:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fate == "hanging":
        time.sleep(60)
    elif fate in FAILURES:
        raise FAILURES[fate][0]


# What a rank raises, and the exit code with which the others end.
FAILURES = {
    "failing": (ValueError("of its own"), 75),
    "mistaken": (UserError("a mistake: the storage timed out"), 2),
    "failed": (TrainingFailed("latents", "a file is gone"), 70),
}


def assemble_until(comm: Comm, config: Config, fate: str, grace: float) -> None:
    """`train` with rank 1 failing as `fate` says while the task is built, and rank 0 waiting for it."""
    client.GRACE_SECONDS = grace

    def assemble(*_: object) -> None:
        time.sleep(0.8)  # so that a beat has said where it is
        if comm.rank == 1:
            meet(fate, Path(config.system.run_dir))
        distributed.barrier()

    trainer.build_task = assemble  # type: ignore[assignment]
    trainer.train(config, {}, comm, resume=False)


def test_a_run_without_trouble_ends_well_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(run_until, 3, tiny_config(*QUICK), tmp_path, "none") == ["ended well"] * 3
    assert exits.last_failure(tmp_path) is None


@pytest.mark.parametrize(
    ("fate", "kind", "words"),
    [
        ("killed", "dead", "its process has ended without a word"),
        ("stopped", "silent", "not heard of for 2 s"),
        ("hanging", "stuck", "no rank has ended a step or a phase for 5 s"),
    ],
)
def test_a_lost_rank_is_named_by_the_others_with_step_and_phase(
    tmp_path: Path, fate: str, kind: str, words: str
) -> None:
    with pytest.raises(RanksFailed):
        run_ranks(run_until, 2, tiny_config(*QUICK), tmp_path, fate, timeout=30)
    failure = exits.last_failure(tmp_path)
    assert failure is not None
    assert (failure.kind, failure.rank) == (kind, 1)
    assert failure.step in (1, 2, 3), "as it last said: a beat ago, or two where the machine is busy"
    assert words in failure.message
    assert "rank 0 " in failure.message
    assert ("after step 3 in all_reduce" in failure.message) == (fate != "killed")
    assert len((tmp_path / exits.FAILURES_FILE).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("fate", "kind"), [("killed", "dead"), pytest.param("stopped", "silent", marks=pytest.mark.L2)]
)
def test_the_first_rank_is_named_too_when_it_is_lost(tmp_path: Path, fate: str, kind: str) -> None:
    """It is the one that judges, so the others know of it what it last told them."""
    with pytest.raises(RanksFailed):
        run_ranks(run_until, 2, tiny_config(*QUICK), tmp_path, fate, 0, timeout=30)
    failure = exits.last_failure(tmp_path)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.host) == (kind, 0, socket.gethostname())
    assert failure.step in (1, 2, 3), "as it last said: a beat ago, or two where the machine is busy"
    assert failure.phase != "?"
    assert "; rank 1 is after step 3 in " in failure.message


def test_a_rank_that_fails_says_so_and_the_others_end_for_it(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="ValueError: of its own"):
        run_ranks(run_until, 2, tiny_config(*QUICK), tmp_path, "failing", timeout=30)
    lines = [json.loads(line) for line in (tmp_path / exits.FAILURES_FILE).read_text().splitlines()]
    assert [(line["kind"], line["rank"]) for line in lines] == [("ValueError", 1), ("failed", 1)]
    assert lines[1]["message"].endswith("ValueError: of its own")


@pytest.mark.parametrize(
    ("fate", "kind"),
    [
        ("killed", "dead"),
        *(pytest.param(*case, marks=pytest.mark.L2) for case in [("stopped", "silent"), ("hanging", "stuck")]),
    ],
)
def test_a_rank_lost_before_the_first_step_is_named_with_what_was_done_there(
    tmp_path: Path, fate: str, kind: str
) -> None:
    config = tiny_config(*QUICK, f"system.run_dir={tmp_path}/run")
    with pytest.raises(RanksFailed):
        run_ranks(assemble_until, 2, config, fate, 1.0, timeout=30)
    lines = [json.loads(line) for line in (tmp_path / "run" / exits.FAILURES_FILE).read_text().splitlines()]
    assert (lines[-1]["kind"], lines[-1]["rank"], lines[-1]["step"]) == (kind, 0 if fate == "hanging" else 1, 0)
    assert {line["phase"] for line in lines} == {"assembling"}
    assert "(host" in lines[-1]["message"]


@pytest.mark.parametrize("fate", FAILURES)
def test_others_end_with_the_code_of_the_rank_that_failed(tmp_path: Path, fate: str) -> None:
    error, code = FAILURES[fate]
    config = tiny_config(*QUICK, f"system.run_dir={tmp_path}/run")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(assemble_until, 2, config, fate, 1.0, timeout=30)
    assert f"rank 0 of 2 died with exit code {code}" in str(failed.value)
    assert str(error) in str(failed.value)
    lines = [json.loads(line) for line in (tmp_path / "run" / exits.FAILURES_FILE).read_text().splitlines()]
    assert [(line["rank"], line["phase"]) for line in lines] == [(1, "assembling")] * 2


def lose(comm: Comm, how: str, out: Path) -> None:
    """Rank 0 meets a real failure of a collective: rank 1 is gone, or does not answer."""
    both = distributed.join_group([[0, 1]], timeout_minutes=1 / 60)
    distributed.gather_rows(torch.ones(1), among=both)
    if comm.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until(out.exists, "the other rank's failure", str)
        return
    try:
        distributed.gather_rows(torch.ones(3), among=both)
    except RuntimeError as error:
        is_of_other = distributed.is_caused_by_other_rank
        out.write_text(f"{is_of_other(error)} {is_of_other(error.__cause__ or error)} {error}")


@pytest.mark.parametrize(("how", "words"), [("killed", "by peer"), ("asleep", "Timed out waiting")])
def test_a_collective_that_fails_for_another_rank_is_known_as_such(tmp_path: Path, how: str, words: str) -> None:
    with suppress(RanksFailed):
        run_ranks(lose, 2, how, tmp_path / "said", timeout=30)
    said = (tmp_path / "said").read_text()
    assert said.startswith("True True ")
    assert words in said


@pytest.mark.parametrize(
    "error",
    [
        TrainingFailed("checkpoint", "rank 1: the disk timed out, connection reset by peer"),
        UserError("gloo/ timed out"),
        OSError("[gloo/x.cc:1] broken pipe"),
        RuntimeError("shape [1, 2] cannot be viewed: a peer tensor timed out"),
        distributed.RankError("rank 0 of 2: gather of (3,) failed: sizes of nccl peers differ"),
    ],
)
def test_what_fails_by_itself_is_not_held_against_others_whatever_it_says(error: Exception) -> None:
    assert not distributed.is_caused_by_other_rank(error)


def test_what_torch_raises_for_other_ranks_is() -> None:
    for kind in (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError):
        assert distributed.is_caused_by_other_rank(kind("NCCL error"))


HANGS = """
import sys, threading, time
from pathlib import Path
from engine.watchdog import client, server

def where_it_hangs():
    time.sleep(60)

found = server.LostRanks("stuck", (0,), server.Heartbeat(0, "a", 3, "assembling"), "stuck: rank 0")
threading.Timer(0.2, client.end_over_lost_ranks, (found, Path(sys.argv[1]))).start()
where_it_hangs()
"""


def test_a_rank_that_is_stuck_says_in_which_line_of_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75
    assert "a rank is lost: stuck: rank 0" in done.stderr
    assert " in where_it_hangs" in done.stderr
