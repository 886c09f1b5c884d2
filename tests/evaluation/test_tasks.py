"""What the evaluation's numbers mean, on cases small enough to know the answer."""

import json
import math
from pathlib import Path

import pytest
import torch

from configs import UserError
from evaluation import run, summary
from evaluation.reconstruction import Psnr, psnr
from evaluation.zero_shot import Accuracy, ClassTable

pytestmark = pytest.mark.L0


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 4, 4)
    recon = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4)])
    assert psnr(target, recon).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_psnr_says_what_the_mean_colour_would_reach() -> None:
    target = torch.cat([torch.zeros(1, 3, 2, 4), torch.ones(1, 3, 2, 4)], dim=2)  # half black, half white
    quality = Psnr()
    quality.add(target, target.clamp(0.1, 0.9))
    result = quality.result()
    assert result["psnr_db"] == pytest.approx(20.0, abs=1e-4)
    assert result["psnr_db_of_mean_colour"] == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    assert result["images"] == 1


def test_accuracy_counts_labelled_images_only() -> None:
    accuracy = Accuracy(torch.eye(8))
    images = torch.eye(8)[[0, 1, 2, 3]] + 0.1 * torch.eye(8)[[1, 0, 3, 7]]
    accuracy.add(images, torch.tensor([0, 0, 2, -1]))  # right, second best, right, without a label
    result = accuracy.result()
    assert result["top1"] == pytest.approx(2 / 3)
    assert result["top5"] == 1.0
    assert result["chance"] == 1 / 8
    assert result["times_chance"] == pytest.approx(16 / 3)
    assert (result["classes"], result["images"]) == (8, 3)


def test_no_labels_is_an_error_and_not_a_number() -> None:
    accuracy = Accuracy(torch.eye(4))
    accuracy.add(torch.eye(4), torch.full((4,), -1))
    with pytest.raises(UserError, match="no held-out sample has a label"):
        accuracy.result()


def test_class_tables_are_read_or_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "classes.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"classes": [{"name": "red circle", "prompts": ["a red circle", "a red disc"]}]}))
    bad.write_text(json.dumps({"classes": [{"name": "red circle"}]}))
    assert ClassTable.read(good) == ClassTable(("red circle",), (("a red circle", "a red disc"),))
    with pytest.raises(UserError, match="no class table"):
        ClassTable.read(bad)
    with pytest.raises(UserError, match="--classes FILE"):
        ClassTable.read(tmp_path / "missing.json")


def test_an_unknown_task_or_run_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(tmp_path), "--tasks", "zero_shot,rfid"]) == 2
    assert capsys.readouterr().err == "error: --tasks: 'rfid' is not one of zero_shot, reconstruction\n"
    assert run.main([str(tmp_path / "nowhere")]) == 2
    assert "is no run directory" in capsys.readouterr().err
    assert summary.main([str(tmp_path / "nowhere")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")


def test_the_summary_shows_first_and_last_losses_and_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [{"step": 10 * i, "loss/clip": 4.0 / i, "speed/samples_per_second": 50.0 + i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, reports)))
    shot = {"top1": 0.25, "times_chance": 16.0, "chance": 1 / 64, "classes": 64, "images": 100}
    rec = {"psnr_db": 24.5, "psnr_db_of_mean_colour": 16.0}
    (tmp_path / "evaluation.json").write_text(json.dumps({"zero_shot": shot, "reconstruction": rec}))
    assert summary.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "4.000 -> 1.333",
        "25.0% of 100 images, 16.0 x chance (1.6%, 64 classes)",
        "24.50 dB",
        "52.0 samples/s",
    ):
        assert expected in shown
