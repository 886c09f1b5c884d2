"""kill -9 at any point of a save: what `latest` names can be loaded, and the next save is as good as any."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.run import Checkpoint
from engine.checkpoint import directory
from engine.checkpoint.contents import newest_good
from engine.checkpoint.saver import DONE, BackgroundSave
from engine.checkpoint.tensor_ranges import RangeReader, TensorRange
from tests.harness import run_ranks

pytestmark = pytest.mark.L1

OF_FILES = ("open", "os.", "shutil.")  # audit events (PEP 578) of everything that Python asks of a file system
SETTINGS = Checkpoint(keep_last=2)


def save(root: Path, step: int) -> None:
    """What rank 0 of one does, without a thread: tensors full of the step's number."""
    directory.clear_drafts(root)
    draft = directory.draft_path(root, step)
    draft.mkdir(parents=True)
    pieces = [TensorRange("fp32", "w", 0, torch.full((5000,), float(step)))]
    writing = BackgroundSave(draft, 0, 1, pieces, {"state.json": "{}", "config.yaml": "name: a\n"}, SETTINGS)
    writing.run()
    assert writing.status.checkpoint == DONE, writing.status


def killed_at(event: int, root: Path, step: int) -> bool:
    """Saves in a child that dies at so many file events; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = event

        def count(name: str, _: tuple[Any, ...]) -> None:
            nonlocal left
            if name.startswith(OF_FILES) and name != "os.kill":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            save(root, step)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def assert_one_can_go_on(root: Path, before: int, after: int) -> int:
    path = newest_good(root, log=pytest.fail)
    step = directory.step_of(path)
    assert step in (before, after), path
    assert RangeReader(path).read("fp32", "w").eq(step).all()
    return step


def kill_at_every_event(root: str) -> tuple[int, set[int]]:
    """Number of events of a save, and the steps from which one could go on after kills at them."""
    event, found, place = 0, set[int](), Path(root) / "checkpoints"
    while True:
        shutil.rmtree(place, ignore_errors=True)
        for step in (100, 200, 300):  # the next save has one to remove
            save(place, step)
        if not killed_at(event, place, 400):
            break
        found.add(assert_one_can_go_on(place, 300, 400))
        save(place, 500)
        assert assert_one_can_go_on(place, 500, 500) == 500
        assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
        event += 1
    return event, found


def test_a_kill_at_any_file_event_of_a_save_leaves_a_good_checkpoint(quick_path: Path) -> None:
    [(events, found)] = run_ranks(kill_at_every_event, 1, str(quick_path), join=False)
    assert events > 25
    assert found == {300, 400}, "some kills come before the commit and some after"


def kill_at_any_time(root: str) -> list[int]:
    """Kills a process that saves without pause, also in the middle of the library's writing; steps gone on from."""
    place, found, step = Path(root) / "checkpoints", [], 1
    save(place, step)
    for number in range(40):
        child = os.fork()
        if child == 0:
            try:
                for following in range(step + 1, step + 1000):
                    save(place, following)
            finally:
                os._exit(0)
        time.sleep(0.002 + 0.0011 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = newest_good(place, log=pytest.fail)
        assert directory.step_of(path) >= step
        step = directory.step_of(path)
        assert RangeReader(path).read("fp32", "w").eq(step).all()
        found.append(step)
    return found


def test_a_kill_at_any_time_leaves_a_good_checkpoint(quick_path: Path) -> None:
    [found] = run_ranks(kill_at_any_time, 1, str(quick_path), join=False)
    assert found == sorted(found)
    assert found[-1] > 5, "it did save in between"
