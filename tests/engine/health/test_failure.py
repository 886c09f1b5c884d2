"""A failed training, or failed storage, ends the run with an exit code of its own and one line."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from data.bad_samples import StorageError
from engine import launch, run, world
from engine.exits import FAILED, LOST_RANK
from engine.health.failure import TrainingFailed
from model.losses.comm import Solo
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


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
    monkeypatch.setattr(run, "train", fails)
    monkeypatch.setattr(world, "start", lambda minutes: Solo())
    monkeypatch.setattr(world, "stop", lambda: None)
    assert vars(launch)["_train"](tiny_config(), {}, False, ()) == code
    assert capsys.readouterr().err == f"error: {error}\n"
