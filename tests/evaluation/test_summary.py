"""A run on one screen."""

import json
from pathlib import Path

import pytest

from evaluation import summary
from profiling.report.run_record import read_run
from profiling.report.sections import summary as report_summary

pytestmark = pytest.mark.L0


def test_the_summary_shows_first_and_last_losses_and_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [{"step": 10 * i, "loss/clip": 4.0 / i, "speed/samples_per_second": 50.0 + i} for i in (1, 2, 3)]
    half = '{"step": 30, "loss/cl'  # what a full disk took of the last report before it took the whole
    (tmp_path / "log.jsonl").write_text("\n".join([*map(json.dumps, reports[:2]), half, json.dumps(reports[2])]))
    shot = {"top1": 0.25, "times_chance": 16.0, "chance": 1 / 64, "classes": 64, "images": 100}
    rec = {"psnr_db": 24.5, "psnr_db_of_mean_colour": 16.0}
    (tmp_path / "evaluation.json").write_text(json.dumps({"zero_shot": shot, "reconstruction": rec}))
    assert "evaluated" not in summary.summarise(tmp_path)
    for steps, is_said in ((30, False), (20, True)):
        figures = {"zero_shot": shot, "reconstruction": rec, "steps": steps}
        (tmp_path / "evaluation.json").write_text(json.dumps(figures))
        assert ("evaluated" in summary.summarise(tmp_path)) is is_said
        said = str(report_summary([read_run(tmp_path)]))
        assert ("was evaluated with the weights of step 20." in said) is is_said
    assert summary.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "4.000 -> 1.333",
        "25.0% of 100 images, 16.0 x chance (1.6%, 64 classes)",
        "24.50 dB",
        "52.0 samples/s",
    ):
        assert expected in shown


def test_a_directory_that_is_no_run_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(tmp_path / "nowhere")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
