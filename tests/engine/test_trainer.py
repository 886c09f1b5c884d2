"""The loop's report saves the checkpoint before it draws pictures; a second run in a directory is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import UserError
from engine import trainer
from engine.health.anomalies import AnomalyCounts
from engine.reporting.reporter import open_reporter
from engine.resume import DataCursor
from engine.run_directory import file_lock, lock_run_directory
from model.losses.comm import Solo
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def report(folder: Path, done: int, draw: Any) -> list[str]:
    """Return the calls of `Trainer._report` after `done` of 4 steps, in order; `draw` is the task's `images`."""
    order: list[str] = []

    def recorded(name: str, result: Any = None) -> Any:
        return lambda *_: order.append(name) or result

    found = AnomalyCounts(step=done, losses=0, gradients=0, spikes=0, skipped=0)
    config = tiny_config(
        "optim.steps=4",
        "system.checkpoint.every=2",
        "system.images_every=2",
        "system.report_every=2",
        f"system.run_dir={folder}",
    )
    data = SimpleNamespace(wait_seconds=float, metrics=dict, order_facts=lambda _: {})
    setup = SimpleNamespace(config=config, comm=None)
    task: Any = SimpleNamespace(setup=setup, data=data, metrics=dict, train_state=recorded("state"), images=draw)
    anomalies: Any = SimpleNamespace(read=lambda _: found, act=recorded("act"), should_stop=lambda: False)
    saver: Any = SimpleNamespace(results=list, save=recorded("save"), finish=recorded("finish", []))
    meter: Any = SimpleNamespace(num_steps=2, read=lambda *_: {"loss/total": 1.0})
    instruments: Any = SimpleNamespace(read=lambda _: {})
    alarms: Any = SimpleNamespace(read=lambda *_: {})
    with open_reporter(folder, total_steps=4, first_step=0, is_main=True) as reporter:
        unused: Any = {"rollbacks": None, "status": None, "memory": None}
        loop = trainer.Trainer(
            task=task,
            anomalies=anomalies,
            alarms=alarms,
            reporter=reporter,
            instruments=instruments,
            saver=saver,
            **unused,
        )
        assert loop._report(done, DataCursor(), meter) is False
    return order


@pytest.mark.parametrize(("done", "order"), [(2, ["act", "state", "save"]), (4, ["act", "state", "save", "finish"])])
def test_a_picture_that_fails_costs_a_line_after_the_checkpoint(tmp_path: Path, done: int, order: list[str]) -> None:
    def fail() -> Any:
        raise RuntimeError("linalg.svd:\nfailed to converge")

    assert report(tmp_path, done, fail) == order
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[-1] == f"could not draw the images of step {done}: RuntimeError: linalg.svd: failed to converge"


def test_pictures_come_after_the_checkpoint_is_on_disk(tmp_path: Path) -> None:
    drawn: list[str] = []
    order = report(tmp_path, 4, lambda: drawn.append("drawn") or {"a": torch.full((3, 2, 2), torch.nan)})
    assert order == ["act", "state", "save", "finish"]
    assert drawn
    assert (tmp_path / "pictures" / "a-00000004.png").exists()


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_lock(tmp_path / "lock") as lock:
        assert lock is not None
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} of host .*`touch {tmp_path}/stop`"):
            lock_run_directory(ExitStack(), tmp_path, wait=0.01)
        assert "waiting 0.01 s for it to end" in capsys.readouterr().err
    with trainer.exclusive_run_directory(tmp_path, wait=0.0), file_lock(tmp_path / "lock") as other:
        assert other is None
    with trainer.exclusive_run_directory(tmp_path, wait=0.0):
        assert capsys.readouterr().err == ""


def test_a_start_that_waited_for_another_run_does_not_write_over_what_that_one_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waited_for_a_run_that_saves(run_dir: Path, wait: float) -> Iterator[None]:
        (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True)
        yield

    monkeypatch.setattr(trainer, "exclusive_run_directory", waited_for_a_run_that_saves)
    monkeypatch.setattr(trainer, "build_task", lambda *_: pytest.fail("the run began"))
    with pytest.raises(UserError, match=r"already holds a run \(step-00000004\): go on with --resume"):
        trainer.train(tiny_config(f"system.run_dir={tmp_path}"), {}, Solo(), resume=False)


def test_a_directory_that_cannot_be_locked_is_a_warning_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with trainer.exclusive_run_directory(tmp_path / "file" / "run", wait=0.0):
        assert "a second run in this directory would not be noticed; start none" in capsys.readouterr().err
