"""A run whose directory cannot be written for a while: what it tells comes late, and its weights are the same."""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import consolidate, trainer
from engine.exits import FAILED, MISTAKE, FailureRecord, last_failure, record_failure
from engine.reporting.images import png
from engine.reporting.reporter import open_reporter
from engine.reporting.sinks import EventFile
from engine.stderr import print_error
from model.weights import read_weights
from profiling.report.run_record import read_run
from tests.engine.small_runs import arguments, differing_weights, launch_here, reported, write_shards
from tests.harness import run_ranks

WAITS = "; what is missing waits in memory, and the run goes on"
WELL = " is written again, and what waited for it"


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Inside, nothing below the folder can be opened for writing through os.open."""
    true_open = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(folder)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return true_open(path, flags, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refusing)
        yield


def board(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.mark.L0
def test_reports_of_a_full_disk_are_written_when_it_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_reporter(tmp_path, total_steps=50, first_step=0, is_main=True) as reporter:
        reporter.scalars(10, {"loss/total": 5.0})
        with full(tmp_path):
            reporter.message("a sentence")
            for step in (20, 30):
                reporter.scalars(step, {"loss/total": step / 2})
        reporter.scalars(40, {"loss/total": 20.0})
        reporter.scalars(50, {"loss/total": 25.0})
    assert reported(tmp_path) == [10, 20, 30, 40, 50]
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("loss/total")] == [
        (10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0), (50, 25.0),
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    [events] = (tmp_path / "tensorboard").iterdir()
    files = (events, tmp_path / "log.jsonl", tmp_path / "log.txt")
    no_space = [f"cannot write {file}: No space left on device{WAITS}" for file in files]
    steps = [f"step {step}/50  loss {step / 2:g}  left ?" for step in (10, 20, 30, 40, 50)]
    expected = [steps[0], "a sentence", steps[1], *no_space, *steps[2:4], *(f"{file}{WELL}" for file in files)]
    assert said == [*expected, steps[4]]
    assert (tmp_path / "log.txt").read_text().splitlines() == said


@pytest.mark.L0
def test_what_is_lost_at_the_end_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full(tmp_path), open_reporter(tmp_path, total_steps=50, first_step=0, is_main=True) as reporter:
        reporter.message("a sentence")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a sentence"
    [log] = [line for line in said if "log.txt" in line]
    assert log == f"cannot write {tmp_path}/log.txt: No space left on device; what waited in memory is lost"


@pytest.mark.L0
def test_a_terminal_that_goes_to_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, FullStream(told))
    with open_reporter(tmp_path, total_steps=50, first_step=0, is_main=True) as reporter:
        reporter.message("a sentence")
        reporter.scalars(10, {"loss/total": 5.0})
    print_error("error: a rank is lost")
    assert [word for word in told if word.strip()] == [
        "a sentence\n",
        "step 10/50  loss 5  left ?",
        "error: a rank is lost",
    ]
    assert reported(tmp_path) == [10]


class FullStream(io.StringIO):
    """Notes what it is given and refuses it."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told = told

    def write(self, text: str) -> int:
        self.told.append(text)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.L0
def test_a_record_that_was_cut_short_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, pwrite = EventFile(tmp_path), os.pwrite
    events.scalars(1, {"a": 1.0})
    events.flush()
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: pwrite(file, content[: len(content) // 2], at))
    events.scalars(2, {"a": 2.0})
    events.flush()
    assert "bytes were written" in events.trouble
    monkeypatch.setattr(os, "pwrite", pwrite)
    events.image(3, "white", torch.ones(3, 4, 8))
    events.text("log", "a line")
    events.flush()
    assert events.trouble == ""
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in found.Scalars("a")] == [(1, 1.0), (2, 2.0)]
    [picture] = found.Images("white")
    assert (picture.step, picture.width, picture.height) == (3, 8, 4)
    assert found.Tensors("log/text_summary")[0].tensor_proto.string_val == [b"a line"]


@pytest.mark.L0
def test_files_beside_the_log_are_whole_or_a_line_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_reporter(tmp_path, total_steps=50, first_step=0, is_main=True) as reporter:
        reporter.write_file(tmp_path / "pictures" / "a.png", png(torch.ones(3, 4, 8)))
        (tmp_path / "no_folder").touch()
        reporter.write_file(tmp_path / "no_folder" / "config.yaml", "name: a\n")
    with Image.open(tmp_path / "pictures" / "a.png") as picture:
        assert picture.size == (8, 4)
    assert capsys.readouterr().out == f"could not write {tmp_path}/no_folder/config.yaml: File exists\n"


@pytest.mark.L0
def test_a_failure_is_recorded_after_half_a_line_and_hidden_by_no_full_disk(tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_text('{"rank": 1, "st')
    record_failure(tmp_path, FailureRecord(3, 120, "backward", "silent", "not heard of"))
    with full(tmp_path):
        record_failure(tmp_path, FailureRecord(4, 120, "backward", "silent", "not heard of"))
    found = last_failure(tmp_path)
    assert found is not None
    assert found.rank == 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "data")


def train(shards: Path, run_dir: Path, full_at: tuple[int, ...], *more: str) -> int:
    """A run of 12 steps on one rank; from the reports after the steps in `full_at` to the next one no file of this
    process grows."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = trainer.Trainer._report

    def limited(self: trainer.Trainer, done: int, *rest: Any) -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if done in full_at else most, most))
        return report(self, done, *rest)

    vars(trainer)["Trainer"]._report = limited
    more = ("optim.steps=12", "system.checkpoint.every=2", "system.checkpoint.background=false", *more)
    return launch_here([*arguments(shards, run_dir), *more])


@pytest.mark.L2
def test_a_run_through_a_full_disk_is_the_run_without_and_its_log_is_whole(shards: Path, tmp_path: Path) -> None:
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    more = ("system.images_every=2", "profile.steps=5:7")
    assert run_ranks(train, 1, shards, whole, (), join=False) == [0]
    assert run_ranks(train, 1, shards, disturbed, (4, 6, 8), *more, join=False) == [0]
    assert differing_weights(whole, disturbed) == []
    assert reported(disturbed) == [2, 4, 6, 8, 10, 12]
    found = read_run(disturbed)
    assert list(found.reports) == [2, 4, 6, 8, 10, 12]
    assert found.series("checkpoint/failed") == [None, 0.0, 1.0, 1.0, 1.0, 0.0]  # as the report after the save knows
    assert found.notes == []
    assert [event.step for event in board(disturbed).Scalars("loss/total")] == [2, 4, 6, 8, 10, 12]
    begun = [line for line in found.messages if line.endswith(f"File too large{WAITS}")]
    ended = [line for line in found.messages if line.endswith(WELL)]
    assert (len(begun), len(ended)) == (3, 3), found.messages  # log.jsonl, log.txt and TensorBoard's
    assert sum(line.startswith("could not save step-") for line in found.messages) == 3
    unseen = [line for line in found.messages if line.startswith(f"could not write {disturbed}/pictures/")]
    assert len(unseen) == 6
    assert any(line.startswith(f"could not write {disturbed}/profile/rank0-steps5-7") for line in found.messages)
    assert list((disturbed / "profile").iterdir()) == []
    pictures = sorted(path.name for path in (disturbed / "pictures").iterdir())
    assert pictures == sorted(f"{kind}-{n:08d}.png" for kind in ("latents", "reconstructions") for n in (2, 10, 12))
    assert [path for path in disturbed.rglob("*") if path.name.endswith(".tmp") or path.stat().st_size == 0] == []


def train_to_a_full_end(shards: Path, run_dir: Path) -> int:
    """The disk is full when the weights are to be written: the checkpoint they come from is there."""
    write = consolidate.write_weights_file

    def limited(*given: Any) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
        try:
            write(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    vars(consolidate)["write_weights_file"] = limited
    return launch_here([*arguments(shards, run_dir), "optim.steps=2"])


@pytest.mark.L1
def test_weights_that_cannot_be_written_are_one_line_and_a_code_that_says_so(shards: Path, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "run" / "weights.safetensors"
    assert run_ranks(train_to_a_full_end, 2, shards, run_dir, join=False) == [FAILED, FAILED]
    assert [path.name for path in run_dir.iterdir() if "weights" in path.name] == []
    said = (run_dir / "log.txt").read_text().splitlines()[-1]
    assert said.startswith(f"stopped: could not write {out}: ")
    assert "File too large" in said
    assert said.endswith("; the checkpoint is complete: remove the cause, then continue with --resume")
    failure = last_failure(run_dir)
    assert failure is not None
    assert failure.kind == "weights"
    root = str(run_dir / "checkpoints")
    with pytest.raises(SystemExit) as refused:  # by the command line: no directory can be made there
        consolidate.main([root, "--out", str(run_dir / "log.txt" / "weights.safetensors")])
    assert refused.value.code == MISTAKE
    assert consolidate.main([root, "--out", str(out)]) == 0
    assert read_weights(out)[0]
