"""Non-finite losses and gradients, spikes, stop requests: what is counted, what is raised, and the exit code."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.run import AnomalyPolicy
from data.bad_samples import StorageError
from engine import distributed, launch, run_directory, trainer
from engine.checkpoint.tensor_ranges import RangeReader, write_ranges
from engine.exits import FAILED, LOST_RANK
from engine.health.anomalies import AnomalyMonitor, GradNormGuard, RollbackRequested, TrainingFailed
from model.losses.comm import Comm, Solo
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

CPU = torch.device("cpu")


def guard(comm: Comm, **settings: Any) -> tuple[AnomalyMonitor, GradNormGuard]:
    health = AnomalyPolicy(**settings)
    judge = GradNormGuard(health, CPU, "model")
    return AnomalyMonitor(comm, CPU, health, [judge]), judge


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
    run_directory.request_stop(tmp_path / "run")
    assert watch.should_stop()
    run_directory.clear_stop_request(tmp_path / "run")
    assert not watch.should_stop()


GUARD_PROCESS = """
import signal, sys, torch
from pathlib import Path
from types import SimpleNamespace
from configs.run import AnomalyPolicy
from engine.health import anomalies
from model.losses.comm import Solo

now = 0.0
anomalies.time = SimpleNamespace(monotonic=lambda: now)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
watch = anomalies.AnomalyMonitor(Solo(), torch.device("cpu"), AnomalyPolicy(), [])
watch.listen(Path(sys.argv[1]))
while True:
    print(watch.should_stop(), flush=True)
    now = float(sys.stdin.readline())
"""


def test_the_first_ctrl_c_makes_the_run_save_and_the_second_ends_it_at_once_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GUARD_PROCESS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = [process.stdout.readline()]
        for now in (0.5, 5.0):  # the second signal comes at once, as from a terminal and a launcher; the third does not
            process.send_signal(signal.SIGINT)
            process.stdin.write(f"{now}\n")
            process.stdin.flush()
            answers.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert answers == ["False\n", "True\n", "True\n"]
    assert process.returncode == -signal.SIGINT
    assert stderr == "SIGINT: the run saves at its next report and ends; a second Ctrl-C ends it at once, unsaved\n"


@pytest.mark.parametrize("is_ignored", [True, False])
def test_sighup_of_a_closed_terminal_makes_the_run_save_unless_nohup_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ignored: bool
) -> None:
    handled: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(
        signal, "getsignal", lambda number: signal.SIG_IGN if is_ignored and number == signal.SIGHUP else signal.SIG_DFL
    )
    guard(Solo())[0].listen(tmp_path)
    assert handled == [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP][: 3 if is_ignored else 4]


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
    with pytest.raises(RollbackRequested) as trouble:
        watch.act(watch.read(5))
    assert (trouble.value.kind, trouble.value.counts.step) == (kind, 5)


def test_a_gradient_alone_stops_nothing_by_default() -> None:
    watch, judge = guard(Solo())
    judge(torch.tensor(math.inf))
    found = watch.read(1)
    watch.act(found)
    assert found.skipped == 1


def judge(**settings: Any) -> GradNormGuard:
    return GradNormGuard(AnomalyPolicy(**settings), torch.device("cpu"), "model")


def judged(by: GradNormGuard, *norms: float) -> list[bool]:
    return [bool(by(torch.tensor(norm, dtype=torch.float64))) for norm in norms]


def test_a_norm_that_is_no_number_is_left_out_whatever_the_policy() -> None:
    by = judge()
    assert judged(by, 1.0, math.nan, math.inf, -1.0, 1e30) == [False, True, True, True, False]
    assert by.counts.tolist() == [3, 0]
    by.reset_counts()
    assert by.counts.tolist() == [0, 0]


def test_a_spike_is_left_out_with_skip_and_only_counted_with_rollback() -> None:
    for policy, is_left_out in (("skip", True), ("rollback", False)):
        by = judge(spike=policy, spike_window=4, spike_factor=3)
        assert judged(by, 1.0, 100.0, 1.0, 2.0) == [False] * 4, "the window was not full"
        assert judged(by, 3.0, 6.01) == [False, is_left_out]  # thrice 1, and more than thrice 2
        assert by.counts.tolist() == [0, 1]


def test_a_norm_that_is_no_number_does_not_enter_the_window() -> None:
    by = judge(spike="skip", spike_window=4, spike_factor=3)
    judged(by, 1.0, 1.0, 1.0, 1.0, math.nan, math.inf)
    assert by.recent is not None
    assert by.recent.tolist() == [1.0] * 4


def test_another_level_is_the_usual_one_half_a_window_later() -> None:
    by = judge(spike="skip", spike_window=8, spike_factor=2)
    judged(by, *[1.0] * 8)
    assert judged(by, *[10.0] * 8) == [True] * 5 + [False] * 3  # of eight, the median is the fourth


@given(st.lists(st.floats(0.1, 10), min_size=4, max_size=20), st.floats(0.1, 100))
def test_a_spike_is_what_exceeds_the_median_of_the_last_norms(norms: list[float], last: float) -> None:
    by = judge(spike="skip", spike_window=4, spike_factor=1.5)
    judged(by, *norms)
    median = torch.tensor(norms[-4:]).median()
    assert judged(by, last) == [bool(torch.tensor(last) > 1.5 * median)]


def test_the_window_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    first, again, longer = (judge(spike="skip", spike_window=window) for window in (4, 4, 5))
    judged(first, 1.0, 2.0, 3.0, 4.0)
    write_ranges(tmp_path / "rank-00000.safetensors", first.state_ranges())
    for each in (again, longer):
        judged(each, math.nan)
        each.load_ranges(RangeReader(tmp_path))
        assert each.counts.tolist() == [0, 0]
    assert again.recent is not None
    assert longer.recent is not None
    assert again.recent.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert longer.recent.isnan().all()
    assert judge().state_ranges() == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingFailed("nonfinite", "3 non-finite losses up to step 120"), FAILED),
        (StorageError("8 shards in a row cannot be read"), LOST_RANK),
    ],
)
def test_it_ends_with_its_code_and_one_line(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setenv("LOCAL_RANK", "0")  # which _train sets, and would leave behind
    monkeypatch.setattr(trainer, "train", fails)
    monkeypatch.setattr(distributed, "start", lambda minutes: Solo())
    monkeypatch.setattr(distributed, "stop", lambda: None)
    assert vars(launch)["_train"](tiny_config(), {}, False, ()) == code
    assert capsys.readouterr().err == f"error: {error}\n"
