"""Saving behind the steps: what is saved is what was, and a save that fails is told to all ranks and ends nothing."""

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import Config
from engine.checkpoint import directory, saver
from engine.checkpoint.contents import load_checkpoint, newest_good
from engine.checkpoint.reading import latest_readable
from engine.checkpoint.saver import Saver, SaveResult, save
from engine.checkpoint.tensor_ranges import RangeReader
from engine.health.anomalies import TrainingFailed
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1


def save_behind_steps(comm: Comm, config: Config, root: Path) -> tuple[list[list[SaveResult]], list[SaveResult]]:
    """Saves step 2 in peace, then again while two more steps are made before any byte is written."""
    parts = ranks.build(config, comm, "zero3")
    ranks.run_steps(parts, config, comm, 0, 2)
    save(root / "in_peace", 2, parts.train_state(None), config)
    may_write, write = threading.Event(), saver.write_ranges

    def late(*arguments: Any) -> None:
        may_write.wait()
        write(*arguments)

    saver.write_ranges = late  # type: ignore[assignment]
    behind = Saver(root / "behind", config)
    behind.save(2, parts.train_state(None))
    early = []
    for step in (2, 3):
        ranks.run_steps(parts, config, comm, step, step + 1)
        early.append(behind.results())
    may_write.set()
    return early, behind.finish()


def test_the_steps_go_on_while_what_was_is_written(tmp_path: Path) -> None:
    [(early, final), (_, of_other)] = run_ranks(save_behind_steps, 2, tiny_config("ema=0.9"), tmp_path)
    assert early == [[], []]
    [result] = final
    assert result.is_good
    assert result.message.startswith(f"saved {tmp_path}/behind/step-00000002: ")
    assert result.scalars.keys() == {f"checkpoint/{name}" for name in ("stall_ms", "seconds", "mib", "failed")}
    assert [each.is_good for each in of_other] == [True]
    one, other = (RangeReader(tmp_path / name / "step-00000002") for name in ("in_peace", "behind"))
    for key in ("fp32", "exp_avg", "exp_avg_sq", "teacher", "average"):
        assert one.names(key)
        for name in one.names(key):
            assert torch.equal(one.read(key, name), other.read(key, name)), (key, name)


def fail_and_go_on(comm: Comm, config: Config, root: Path) -> list[list[str]]:
    """Rank 1's disk is full for step 1's file, which it learns from the system itself; step 2's goes well."""
    parts = ranks.build(config, comm, "zero2")
    saver, said = Saver(root / "checkpoints", config), []
    for step in (1, 2, 3):
        ranks.run_steps(parts, config, comm, step - 1, step)
        if comm.rank == 1:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == 2 else most, most))
        saver.save(step, parts.train_state(None))
        while not (results := saver.results()):
            pass
        said.append([each.message for each in results])
    return said


def test_a_failed_save_leaves_the_one_before_and_the_next_tries_again(tmp_path: Path) -> None:
    config = tiny_config()
    one, other = run_ranks(fail_and_go_on, 2, config, tmp_path)
    root = tmp_path / "checkpoints"
    for first, second, third in (one, other):
        assert first[0].startswith(f"saved {root}/step-00000001: ")
        assert second[0].startswith("could not save step-00000002: rank 1: ")
        assert "File too large" in second[0]
        assert second[0].endswith("the last good checkpoint is step-00000001")
        assert third[0].startswith(f"saved {root}/step-00000003: ")
    assert [directory.step_of(path) for path in directory.complete_checkpoints(root)] == [1, 3]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000003"]


def save_where_one_cannot(comm: Comm, config: Config, root: Path) -> tuple[list[str], str]:
    kept, saver = ranks.build(config, comm, "zero2").train_state(None), Saver(root / "a_file" / "checkpoints", config)
    saver.save(1, kept)
    said = [each.message for each in saver.results()]
    saver.save(2, kept)
    with pytest.raises(TrainingFailed) as caught:  # so the run's exit code is FAILED
        saver.finish()
    assert caught.value.kind == "checkpoint"
    return said, str(caught.value)


def test_a_directory_that_cannot_even_be_looked_at_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for name in ("clear_drafts", "resume_candidates"):
        monkeypatch.setattr(directory, name, stale)
    saver = Saver(tmp_path, tiny_config())
    saver.save(1, None)  # type: ignore[arg-type]  # nothing of it is looked at
    [result] = saver.results()
    assert result.message == (
        "could not save step-00000001: [Errno 116] Stale file handle; the checkpoints before it cannot be seen now"
    )


def test_a_place_that_cannot_be_written_is_an_error_only_where_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    for said, raised in run_ranks(save_where_one_cannot, 2, tiny_config(), tmp_path):
        [words] = said
        assert words.startswith("could not save step-00000001: [Errno 20] Not a directory")
        assert words.endswith("there is no checkpoint yet")
        assert raised.startswith("could not save step-00000002: ")


def save_twice(comm: Comm, config: Config, root: Path) -> None:
    parts = ranks.build(config, comm, "zero3")
    for step in (1, 2):
        ranks.run_steps(parts, config, comm, step - 1, step)
        save(root, step, parts.train_state(None), config)


def go_on(comm: Comm, config: Config, root: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    state = load_checkpoint(newest_good(root, said.append), ranks.build(config, comm, "zero1").train_state(None))
    return state.step, said


def test_all_ranks_of_another_world_size_pass_over_what_one_finds_damaged(tmp_path: Path) -> None:
    config = tiny_config()
    run_ranks(save_twice, 2, config, tmp_path)
    damaged = tmp_path / "step-00000002" / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert directory.step_of(latest_readable(tmp_path)) == 2, "at first sight it is as it was"
    for step, said in run_ranks(go_on, 3, config, tmp_path):
        assert step == 1
        [words] = said
        assert "step-00000002/rank-00001.safetensors is not what was saved" in words
