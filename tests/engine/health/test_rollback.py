"""Back to a checkpoint in the same processes: the run goes on as if the bad data had never been there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import RunConfig
from engine.checkpoint import reading
from engine.health.anomalies import TrainingFailed
from model.initialise import initialise
from model.losses.comm import Comm
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.weights import write_weights
from tests.data.latents.stores import write_public_store
from tests.engine.health import runs
from tests.engine.health.runs import Spoilt, difference
from tests.engine.tasks.decoder_gan_runs import stage_config
from tests.engine.tasks.test_generator import SHAPE, tiny
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1

OFTEN = {"report_every": 2, "checkpoint": {"every": 4}}
TWELVE = ("optim.steps=12", "system.report_every=2", "system.checkpoint.every=4")
EIGHT = ("optim.steps=8", *TWELVE[1:])
BACK = "health.nonfinite=rollback"


def say_why(comm: Comm, *arguments: Any) -> tuple[str, str]:
    """(kind, message) of a run that fails."""
    with pytest.raises(TrainingFailed) as error:
        runs.train(comm, *arguments)
    return error.value.kind, str(error.value)


def of_kind(kind: str, place: Path) -> RunConfig:
    """A small run with often a report, and a policy to go back."""
    if kind == "generator":
        store = write_public_store(place / "store", [40, 24], SHAPE)
        return tiny(store, system=OFTEN, health={"nonfinite": "rollback"}, optim=_optim(8))
    if kind == "pretraining":
        return tiny_config(*EIGHT, BACK, "optim.precision=bf16", "system.optimizer=torch")
    model = tiny_config()
    built = Pretrainer(model, RankBatchSizes.per_rank(model, 1), "sdpa")
    initialise(built, model)
    write_weights(place / "weights.safetensors", built.state_dict(), model.model)
    return stage_config(
        place / "weights.safetensors", system=OFTEN, health={"nonfinite": "rollback"}, optim={"steps": 8}
    )


def state(run_dir: Path) -> reading.CheckpointState:
    return reading.read_state(reading.latest_readable(run_dir / "checkpoints"))


def _optim(steps: int) -> dict[str, Any]:
    return {"steps": steps, "lr": 1e-2, "lr_batch": 12, "warmup": 0.0, "precision": "fp32"}


CLIP_ALONE = ("objectives.ssl.weight=0", "batch.ssl=0", "objectives.rec.weight=0", "batch.rec=0")
CENTRED = ("objectives.ssl.targets=centering", "ema=0.9", "model.trunk.drop_path=0.4")


@pytest.fixture(scope="module")
def went_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run with bad data at place 5. Seen at step 6, it sends the run back to step 4."""
    config, run_dir = tiny_config(*TWELVE, BACK, *CENTRED), tmp_path_factory.mktemp("went_back")
    run_ranks(runs.train, 2, config, run_dir, Spoilt({5: "nan"}))
    return config, run_dir


def test_a_run_that_went_back_is_the_run_without_the_bad_data(
    went_back: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    """The places 4 and 5 are left out."""
    config, bad = went_back
    good = run_ranks(runs.train, 2, config, tmp_path, Spoilt(left_out=(4, 5)))[0]
    assert difference(runs.state_of(bad), good) == []
    assert "back to step 4; the data of 2 steps is left out" in (bad / "log.txt").read_text()
    reported = runs.reports(bad)
    assert [report["step"] for report in reported] == [2, 4, 6, 6, 8, 10, 12]
    assert reported[2]["health/nonfinite_losses"] == 2, "clip shows every rank the features of the bad one"
    assert [report["health/steps_of_data_left_out"] for report in reported] == [0, 0, 0, 2, 2, 2, 2]
    assert (state(bad).skipped_steps, state(tmp_path).skipped_steps) == (2, 0)
    assert state(bad).samples_digest == state(tmp_path).samples_digest != ""


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.L2)])
def test_a_run_resumed_is_the_run_that_went_on(went_back: tuple[RunConfig, Path], tmp_path: Path, step: int) -> None:
    """From step 8, which is after the roll-back; and from step 4, where the resumed run meets the bad data again."""
    config, whole = went_back
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    assert (
        difference(run_ranks(runs.train, 2, config, tmp_path, Spoilt({5: "nan"}), True)[0], runs.state_of(whole)) == []
    )
    assert state(tmp_path).samples_digest == state(whole).samples_digest


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.L2) for kind in ("generator", "decoder_gan")), "pretraining"]
)
def test_every_kind_of_run_can_go_back_under_every_stage(tmp_path: Path, kind: str) -> None:
    config, stage = of_kind(kind, tmp_path), {"generator": "zero2", "pretraining": "zero1"}.get(kind, "zero3")
    bad = run_ranks(runs.train, 2, config, tmp_path / "bad", Spoilt({5: "nan"}), False, stage)[0]
    good = run_ranks(runs.train, 2, config, tmp_path / "good", Spoilt(left_out=(4, 5)), False, stage)[0]
    assert difference(bad, good) == []
    assert state(tmp_path / "bad").skipped_steps == 2


def test_a_spike_sends_a_run_back(tmp_path: Path) -> None:
    asked = (
        "health.spike=rollback",
        "health.spike_window=4",
        "objectives.rec.l2=1",
        "objectives.ssl.weight=0",
        "batch.ssl=0",
    )
    config = tiny_config(*EIGHT, *asked)
    bad = run_ranks(runs.train, 2, config, tmp_path / "bad", Spoilt({5: "huge"}))[0]
    good = run_ranks(runs.train, 2, config, tmp_path / "good", Spoilt(left_out=(4, 5)))[0]
    assert difference(bad, good) == []
    assert "1 spikes up to step 6: back to step 4" in (tmp_path / "bad" / "log.txt").read_text()


def test_a_run_without_a_checkpoint_stops(tmp_path: Path) -> None:
    config = tiny_config(*EIGHT, *CLIP_ALONE, BACK)
    kind, message = run_ranks(say_why, 2, config, tmp_path, Spoilt({1: "nan"}))[1]
    assert kind == "nonfinite"
    assert "before the first checkpoint: there is nothing to go back to" in message


def test_a_run_that_goes_back_again_and_again_stops(tmp_path: Path) -> None:
    config = tiny_config(*EIGHT, *CLIP_ALONE, BACK, "health.most_rollbacks=2")
    spoilt = Spoilt(dict.fromkeys(range(5, 40), "nan"))
    kind, message = run_ranks(say_why, 2, config, tmp_path, spoilt)[0]
    assert kind == "nonfinite"
    assert "after 2 roll-backs to step 4 (health.most_rollbacks)" in message
    assert (tmp_path / "log.txt").read_text().count("back to step 4;") == 2
