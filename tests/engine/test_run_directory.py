"""A stop request is for the run that is under way, not for one to come."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import run_directory, trainer
from model.losses.comm import Solo
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


class Assembled(Exception):
    pass


def test_a_start_removes_a_wish_from_before_and_leaves_one_that_comes_while_it_assembles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def assemble(*_: object) -> None:
        assert not run_directory.is_stop_requested(run_dir)
        run_directory.request_stop(run_dir)
        raise Assembled

    monkeypatch.setattr(trainer, "build_task", assemble)
    assert run_directory.request_stop(run_dir)
    with pytest.raises(Assembled):
        trainer.train(tiny_config(f"system.run_dir={run_dir}"), {}, Solo(), resume=False)
    assert run_directory.is_stop_requested(run_dir)


def test_a_wish_that_cannot_be_written_is_told_and_none_is_removed_without_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not run_directory.request_stop(tmp_path / "file" / "run")
    run_directory.clear_stop_request(tmp_path / "nowhere")
