"""The guard: what it finds, what it makes of it, and a polite stop."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.health import Health
from engine import stop_file
from engine.health.failure import TrainingFailed
from engine.health.guard import GoBack, Guard
from engine.health.judge import Judge
from model.objectives.comm import Comm, Solo
from tests.harness import run_ranks

pytestmark = pytest.mark.L0

CPU = torch.device("cpu")


def guard(comm: Comm, **settings: Any) -> tuple[Guard, Judge]:
    health = Health(**settings)
    judge = Judge(health, CPU, "model")
    return Guard(comm, CPU, health, [judge]), judge


def stop_when_one_is_asked(comm: Comm, run_dir: Path) -> list[Any]:
    watch, _ = guard(comm)
    watch.listen(run_dir)
    answers: list[Any] = [watch.should_stop()]
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    answers.append(watch.should_stop())
    watch.watch(torch.tensor(math.nan if comm.rank == 1 else 1.0))
    answers.append(watch.read(7).losses)
    return answers


def test_ranks_find_the_same_and_stop_together(tmp_path: Path) -> None:
    assert run_ranks(stop_when_one_is_asked, 2, tmp_path) == [[False, True, 1]] * 2


def test_a_file_in_the_runs_directory_asks_it_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    watch, _ = guard(Solo())
    watch.listen(tmp_path / "run")
    assert not watch.should_stop()
    stop_file.ask(tmp_path / "run")
    assert watch.should_stop()
    stop_file.forget(tmp_path / "run")
    assert not watch.should_stop()


def test_a_loss_that_is_no_number_stops_the_run_unless_told_otherwise() -> None:
    watch, _ = guard(Solo())
    watch.watch(torch.tensor(1e30))
    watch.act(watch.read(1))
    watch.watch(torch.tensor(math.inf))
    with pytest.raises(TrainingFailed, match="1 non-finite losses up to step 2") as error:
        watch.act(watch.read(2))
    assert error.value.kind == "nonfinite"
    watch.act(watch.read(3))  # counted once


def test_skipped_steps_are_counted_and_nothing_is_raised() -> None:
    watch, judge = guard(Solo(), nonfinite="skip", spike="skip", spike_window=4)
    for norm in (1.0, 1.0, 1.0, 1.0, 100.0, math.inf):
        judge(torch.tensor(norm))
    watch.watch(torch.tensor(math.nan))
    found = watch.read(6)
    watch.act(found)
    assert (found.losses, found.gradients, found.spikes, found.skipped) == (1, 1, 1, 2)
    assert found.values()["health/skipped_steps"] == 2
    assert str(found) == "1 non-finite losses, 1 non-finite gradients, 1 spikes up to step 6"


@pytest.mark.parametrize(
    ("policy", "kind"), [({"nonfinite": "rollback"}, "nonfinite"), ({"spike": "rollback"}, "spike")]
)
def test_a_rollback_is_asked_for_by_what_its_policy_names(policy: dict[str, str], kind: str) -> None:
    watch, judge = guard(Solo(), **policy, spike_window=4) if "spike" in policy else guard(Solo(), **policy)
    for norm in (1.0, 1.0, 1.0, 1.0):
        judge(torch.tensor(norm))
    watch.act(watch.read(4))
    judge(torch.tensor(100.0 if kind == "spike" else math.inf))
    with pytest.raises(GoBack) as trouble:
        watch.act(watch.read(5))
    assert (trouble.value.kind, trouble.value.found.step) == (kind, 5)


def test_a_gradient_alone_stops_nothing_by_default() -> None:
    watch, judge = guard(Solo())
    judge(torch.tensor(math.inf))
    found = watch.read(1)
    watch.act(found)
    assert found.skipped == 1
