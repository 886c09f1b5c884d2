"""A training that failed by itself ends with a code of its own, and one line."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from engine import launch, run, world
from engine.exits import FAILED
from engine.health.failure import TrainingFailed
from model.objectives.comm import Solo
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_it_ends_with_code_70_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any) -> NoReturn:
        raise TrainingFailed("nonfinite", "3 non-finite losses up to step 120")

    monkeypatch.setattr(run, "train", fails)
    monkeypatch.setattr(world, "start", lambda minutes: Solo())
    monkeypatch.setattr(world, "stop", lambda: None)
    assert vars(launch)["_train"](tiny_config(), {}, False, ()) == FAILED
    assert capsys.readouterr().err == "error: 3 non-finite losses up to step 120\n"
