"""Evaluating a convolutional autoencoder: what it has is measured, what it has not is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation import run
from tests.evaluation.tiny_runs import run_config, write_labelled_corpus
from tests.model.tiny_weights import write_run
from tests.tiny import CONV

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpus(tmp_path_factory.mktemp("corpus") / "labelled")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config(corpus, *CONV, "model.latent=gaussian", "objectives.rec.kl=1e-6")
    return write_run(tmp_path_factory.mktemp("runs") / "conv", config)


def test_latents_are_probed_and_there_are_no_blocks_to_probe(trained: Path, tmp_path: Path) -> None:
    tasks = "reconstruction,linear_probe,knn"
    assert run.main([str(trained), "--tasks", tasks, "--batch-size", "4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["reconstruction"]["images"] == 11
    assert found["reconstruction"]["psnr_db"] > 0
    for task in ("linear_probe", "knn"):
        assert [name for name in found[task] if name.endswith("_top1")] == ["latent_top1"]


def test_zero_shot_says_that_there_is_no_text_tower(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(trained), "--tasks", "zero_shot"]) == 2
    assert "needs the text, which these weights do not hold" in capsys.readouterr().err
