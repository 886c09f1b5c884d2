"""Means of a report, sinks, images of a report; an alarm is logged once until it is over."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine.optim import parameter_groups
from engine.reporting import sinks
from engine.reporting.reporter import AlarmRule, ReportAlarms, alarm_rules, open_reporter
from engine.reporting.sinks import plain_line
from engine.reporting.step_meter import StepMeter
from engine.tasks.task import StepResult
from model.losses.comm import Comm, Solo
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def record(total: float, accuracy: float = 0.5, saved: float = 0.5) -> StepResult:
    return StepResult(
        losses={"total": torch.tensor(total), "clip_accuracy": torch.tensor(accuracy)},
        schedule={"learning_rate": 0.1},
        grad_norm=torch.tensor(2.0, dtype=torch.float64),
        counted={"speed/caption_tokens_saved": saved},
    )


def test_a_report_is_the_mean_of_its_steps_and_starts_anew() -> None:
    meter = StepMeter(Solo(), total_steps=10, samples_per_step=8)
    meter.add(record(1.0))
    meter.add(record(3.0, accuracy=1.0, saved=0.7))
    values = meter.read(2, waited_seconds=0.0)
    assert values["loss/total"] == 2.0
    assert values["health/clip_accuracy"] == 0.75
    assert values["optim/grad_norm"] == 2.0
    assert values["speed/caption_tokens_saved"] == pytest.approx(0.6)
    assert values["optim/learning_rate"] == 0.1
    assert values["speed/samples_per_second"] == pytest.approx(8000 / values["speed/step_ms"])
    assert values["speed/seconds_left"] == pytest.approx(8 * values["speed/step_ms"] / 1000)
    meter.add(record(7.0))
    assert meter.read(3, waited_seconds=0.0)["loss/total"] == 7.0


def test_what_is_no_loss_is_reported_as_health() -> None:
    meter, one = StepMeter(Solo(), total_steps=1, samples_per_step=1), torch.tensor(1.0)
    terms = {"total": one, "kl": one, "latent_std": one, "logits_real": one}
    meter.add(StepResult(terms, {}, one, {}))
    values = meter.read(1, waited_seconds=0.0)
    assert {"loss/total", "loss/kl", "health/latent_std", "health/logits_real"} <= values.keys()


def test_a_sink_that_raises_loses_its_report_and_the_other_sinks_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no figure")

    monkeypatch.setattr(sinks.TensorBoard, "scalars", fail)
    with open_reporter(tmp_path, total_steps=20, first_step=0, is_main=True) as reporter:
        for step in (10, 20):
            reporter.scalars(step, {"loss/total": 1.0})
        reporter.write_file(tmp_path / "config.yaml", "name: \udce9\n")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]
    output = capsys.readouterr()
    assert output.err == "TensorBoard lost a report (TypeError: no figure)\n", "once"
    assert f"could not write {tmp_path}/config.yaml: 'utf-8' codec can't encode" in output.out


def mean_over_ranks(comm: Comm) -> float:
    meter = StepMeter(comm, total_steps=1, samples_per_step=1)
    meter.add(record(1.0 + 2 * comm.rank))
    return meter.read(1, waited_seconds=0.0)["loss/total"]


def data_wait_share(comm: Comm) -> float:
    meter = StepMeter(comm, total_steps=1, samples_per_step=1)
    meter.add(record(1.0))
    meter._since -= 100.0
    return meter.read(1, waited_seconds=50.0 * comm.rank)["speed/data_wait_share"]


def test_ranks_report_one_mean() -> None:
    assert run_ranks(mean_over_ranks, 2) == [2.0, 2.0]


def test_the_wait_for_data_is_that_of_the_rank_that_waited_longest() -> None:
    shares = run_ranks(data_wait_share, 2)
    assert shares == pytest.approx([0.5, 0.5], rel=0.1)  # of 100 s and what reading takes


def test_reports_are_lines_of_json_and_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_reporter(tmp_path / "run", total_steps=20, first_step=0, is_main=True) as reporter:
        reporter.message("attention: sdpa")
        reporter.scalars(10, {"loss/total": 7.25, "loss/clip": 2.0, "speed/seconds_left": 61.0})
    [line] = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss/total"] == 7.25
    expected = "step 10/20  loss 7.25  clip 2  left 00:01:01"
    assert (tmp_path / "run" / "log.txt").read_text().splitlines() == ["attention: sdpa", expected]
    assert capsys.readouterr().out.splitlines() == ["attention: sdpa", expected]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    with open_reporter(tmp_path / "run", total_steps=20, first_step=0, is_main=False) as reporter:
        reporter.scalars(10, {"loss/total": 7.25})
    assert not (tmp_path / "run").exists()


def test_a_line_says_so_when_the_time_left_is_not_known() -> None:
    assert plain_line(1, 2, {"loss/total": 1.0}).endswith("left ?")
    for seconds, said in ((59.9, "00:00:59"), (30 * 3600, "1 d 06:00:00"), (math.inf, "?")):
        assert plain_line(1, 2, {"speed/seconds_left": seconds}).endswith(f"left {said}")


def test_only_matrices_decay() -> None:
    config = tiny_config("model.trunk.layer_scale=1e-5", "objectives.clip.kind=sigmoid", "model.registers=1")
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    matrices, vectors = parameter_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in matrices["params"]}
    spared = {names[id(parameter)] for parameter in vectors["params"]}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {"trunk.patch_embed.weight", "text.token_embedding.weight", "prototypes.last_layer.weight_v"} <= decayed
    assert {"trunk.cls_token", "trunk.mask_token", "clip.logit_scale", "clip.logit_bias"} <= spared
    assert {"trunk.blocks.0.ls1.gamma", "trunk.norm.weight", "prototypes.last_layer.weight_g"} <= spared
    assert decayed | spared == {name for name in names.values() if not name.startswith("teacher.")}


def test_an_alarm_is_told_once_and_is_over_a_tenth_inside_the_range() -> None:
    said: list[str] = []
    alarms = ReportAlarms([AlarmRule("x", "health/x", 1.0, 10.0, "why it matters")], said.append)
    seen = [2.0, 0.5, 1.05, 0.9, 1.05, 1.2, 9.5, 11.0, 9.5, math.nan, 8.9]
    on = [alarms.read(step, {"health/x": value})["health/alarm/x"] for step, value in enumerate(seen)]
    assert on == [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert said == [
        "alarm at step 1: health/x is 0.5, not between 1 and 10: why it matters",
        "alarm over at step 5: health/x is 1.2",
        "alarm at step 7: health/x is 11, not between 1 and 10: why it matters",
        "alarm over at step 10: health/x is 8.9",
    ]


def test_pretraining_watches_teacher_prototypes_and_latents() -> None:
    config = tiny_config("system.checks.alarms.prototype_share=0.25")
    healthy = {"teacher_entropy": 2.0, "prototype_share": 0.1, "latent_std_min": 0.5, "latent_std_max": 2.0}
    for name, value in {
        "teacher_entropy": 0.01, "prototype_share": 0.3, "latent_std_min": 0.001, "latent_std_max": 1e3
    }.items():  # fmt: skip
        said: list[str] = []
        found = ReportAlarms(alarm_rules(config), said.append).read(
            1, {f"health/{k}": v for k, v in (healthy | {name: value}).items()}
        )
        assert {key for key, is_on in found.items() if is_on} == {f"health/alarm/{name}"}
        assert len(said) == 1
    assert ReportAlarms(alarm_rules(config), said.append).read(1, {"health/teacher_entropy": math.log(48)})
    assert said[-1].startswith("alarm at step 1: health/teacher_entropy is 3.871")
    assert said[-1].endswith("the teacher's targets are one-hot or uniform")
    assert ReportAlarms(alarm_rules(config), said.append).read(1, {"loss/total": 1.0}) == {}
