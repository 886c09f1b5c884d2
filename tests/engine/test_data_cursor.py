"""Every checkpoint says which samples made it, and a resume notices another corpus."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import Config, UserError
from data.order import CorpusFacts, Order
from engine import resume
from engine.checkpoint import reading
from engine.health.anomalies import RollbackRequested
from engine.resume import DataCursor, Rollbacks, batch_change_message, check_corpus, resume_cursor
from tests.engine.health import runs
from tests.engine.health.runs import Spoilt
from tests.engine.small_runs import write_checkpoint
from tests.harness import run_ranks
from tests.tiny import tiny_config

SHORT = ("optim.steps=2", "system.report_every=1", "objectives.ssl.weight=0", "batch.ssl=0")


def digest(run_dir: Path) -> str:
    return reading.read_state(reading.latest_readable(run_dir / "checkpoints")).samples_digest


@pytest.mark.L1
def test_the_digest_knows_no_world_size(tmp_path: Path) -> None:
    for world_size in (1, 2):
        run_ranks(runs.train, world_size, tiny_config(*SHORT), tmp_path / str(world_size), Spoilt())
    assert digest(tmp_path / "1") == digest(tmp_path / "2") != ""


def facts(samples: int, position: int) -> dict[str, str]:
    return CorpusFacts(["a.tar"], Order([samples], 1, 1, 0)).at(position)


def task_on(config: Config, num_samples: int) -> Any:
    data = SimpleNamespace(order_facts=lambda position: facts(num_samples, position))
    return SimpleNamespace(setup=SimpleNamespace(config=config), data=data)


@pytest.mark.L0
def test_a_resume_on_another_corpus_is_refused_by_what_has_changed(tmp_path: Path) -> None:
    config = tiny_config()
    path = write_checkpoint(tmp_path, config, skipped_steps=2, corpus=facts(64, 5 * 12))
    same, other = task_on(config, 64), task_on(config, 65)
    check_corpus(same, path, ())
    check_corpus(other, path, ("data",))
    for allowed in (("optim.lr",), ("batch.clip",)):
        with pytest.raises(UserError, match="samples: 64 -> 65; names and sizes of the shards"):
            check_corpus(other, path, allowed)


@pytest.mark.L0
def test_a_resume_with_another_batch_size_starts_at_the_next_sample_and_logs_it(tmp_path: Path) -> None:
    before, larger = tiny_config(), tiny_config("batch.clip=24")
    path = write_checkpoint(tmp_path, before, skipped_steps=2, corpus=facts(64, 5 * 12))
    assert resume_cursor(path, before) == DataCursor(3, 2)
    assert batch_change_message(path, before) == ""
    cursor = resume_cursor(path, larger)
    assert [cursor.position(done, larger) for done in (3, 4, 5)] == [60, 84, 108]
    assert batch_change_message(path, larger) == (
        "batch size 12 in the checkpoint, 24 in this run: the run resumes at sample 60 of the data, none is skipped or "
        "repeated"
    )
    check_corpus(task_on(larger, 64), path, ("batch.clip",))


@pytest.mark.L0
def test_after_a_change_of_the_batch_size_the_position_is_the_saved_one(tmp_path: Path) -> None:
    larger, smaller = tiny_config("batch.clip=24"), tiny_config("batch.clip=6", "batch.ssl=6", "batch.rec=6")
    path = write_checkpoint(tmp_path, larger, position=84)  # two steps of 30 and one of 24, say
    for config in (larger, smaller):
        cursor = resume_cursor(path, config)
        assert [cursor.position(done, config) for done in (3, 4)] == [84, 84 + config.batch.clip]


@pytest.mark.L0
def test_with_other_streams_the_run_resumes_at_a_multiple_of_them_and_logs_what_is_skipped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_config(), position=84)
    config = tiny_config("data.streams=5", "batch.clip=20", "batch.ssl=5", "batch.rec=5")
    cursor = resume_cursor(path, config)
    assert cursor.position(3, config) == 85
    assert "at sample 85 of the data, 1 before it are skipped" in batch_change_message(path, config)


@pytest.mark.L0
def test_a_roll_back_to_before_a_change_of_the_batch_size_repeats_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was resumed at step 3, position 36, with 24 a step; at step 5 it goes back to step 2, of 12 a step."""
    config = tiny_config("batch.clip=24")
    begun = DataCursor(step=3, offset=36 - 3 * 24)
    monkeypatch.setattr(resume, "on_first_rank", lambda work: [tmp_path])
    monkeypatch.setattr(resume, "newest_good", lambda root, say: tmp_path)
    monkeypatch.setattr(
        resume.reading, "read_state", lambda path: reading.CheckpointState(2, {}, 1, "", {}, position=24)
    )
    monkeypatch.setattr(resume, "load_checkpoint", lambda path, kept: None)
    training: Any = SimpleNamespace(setup=SimpleNamespace(config=config), train_state=lambda: None)
    trouble = RollbackRequested("spike", SimpleNamespace(step=5))  # type: ignore[arg-type]
    cursor = Rollbacks(1).go_back(training, begun, trouble, lambda words: None)
    assert cursor.step == 2
    assert cursor.position(2, config) == begun.position(5, config) == 84
