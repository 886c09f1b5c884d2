"""The whole command on a tiny run: figures, files, ranks, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs import UserError
from data.captions import train_bpe
from engine.checkpoint.directory import checkpoint_name
from engine.distributed import Ranks
from evaluation import results, run
from evaluation.features import CorpusNetwork, write_corpus_network
from evaluation.results import TaskResult
from evaluation.run import EvaluationOptions
from model.tokenizer import VisualTokenizer
from model.weights import WeightsOrigin, read_weights, write_weights
from tests.data.tar_shards import encoded, write_tar
from tests.evaluation.tiny_runs import write_labelled_corpus, write_run
from tests.harness import run_ranks
from tests.model.loopback_hub import serving

pytestmark = pytest.mark.L0
ALL = "zero_shot,linear_probe,knn,reconstruction"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpus(tmp_path_factory.mktemp("corpus") / "labelled")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", corpus)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    write_corpus_network(path, CorpusNetwork(5, 16), 0.96, "none")
    return path


def evaluated(out: Path, *arguments: object) -> dict[str, Any]:
    assert run.main([*map(str, arguments), "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def test_all_tasks_share_a_pass_and_leave_figures_and_images(
    trained: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(tmp_path, trained, "--tasks", ALL, "--fid", network, "--batch-size", 4)
    about = ["source", "weights", "steps", "latents", "held_out", "crop", "bad_samples"]
    assert list(found) == [*ALL.split(","), "rows", *about]
    assert found["source"] == str(trained)
    assert found["zero_shot"]["images"] == found["knn"]["images"] == found["reconstruction"]["images"] == 11
    assert found["linear_probe"]["train_images"] == 30
    [rfid] = [name for name in found["reconstruction"] if name.startswith("rfid")]
    assert rfid.startswith("rfid[corpus:")
    assert rfid.endswith(", 64-d, 96 % acc]")
    assert found["crop"] == 32
    assert {row["task"] for row in found["rows"]} == {"linear_probe"}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {
        "zero_shot_confusion", "linear_probe_lr", "reconstructions_best", "reconstructions_worst", "held_out",
    }  # fmt: skip
    shown = capsys.readouterr().out
    for expected in ("zero_shot", "latent_top1", "psnr_db", "rfid[corpus:", "not computed: no weights"):
        assert expected in shown
    again = evaluated(tmp_path, trained, "--tasks", ALL, "--fid", network, "--batch-size", 4)
    assert again == found


def test_figures_survive_failures_of_images_and_of_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("svd:\nfailed")

    outcome = TaskResult({"top1": 0.5}, plots={"first": fail, "second": Path.touch})
    results.write_results(tmp_path, {"knn": {"top1": 0.5}}, {"knn": outcome})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"knn": {"top1": 0.5}}
    assert (tmp_path / "pictures" / "second.png").exists()
    assert capsys.readouterr().err == f"could not draw {tmp_path}/pictures/first.png: RuntimeError: svd: failed\n"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "evaluation.json").mkdir()
    with pytest.raises(UserError, match=r'cannot be written .*the figures are {"knn": {"top1": 0.5}}'):
        results.write_results(tmp_path / "full", {"knn": {"top1": 0.5}}, {})


def test_results_go_into_the_run_unless_told_otherwise(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert run.main([str(copy)]) == 0
    found = json.loads((copy / "evaluation.json").read_text())
    assert {"zero_shot", "reconstruction"} < set(found)
    assert (copy / "pictures" / "held_out.png").exists()


def test_a_weights_file_alone_is_evaluated_with_what_is_given(trained: Path, corpus: Path, tmp_path: Path) -> None:
    whole = evaluated(tmp_path / "run", trained)
    file = shutil.copy(trained / "weights.safetensors", tmp_path / "weights.safetensors")
    given = ("--data", corpus / "held_out", "--crop", 32)
    found = evaluated(tmp_path / "file", file, *given, "--tokenizer", corpus / "tokenizer.json")
    assert found["zero_shot"] == whole["zero_shot"]
    assert found["reconstruction"] == whole["reconstruction"]
    assert (found["source"], whole["source"]) == (str(file), str(trained))
    assert (found["weights"], found["latents"]) == (whole["weights"], whole["latents"])
    state, model = read_weights(file)
    for name, same_latents in (("decoder.norm.weight", True), ("trunk.norm.weight", False)):
        write_weights(tmp_path / "other.safetensors", state | {name: 2 * state[name]}, model)
        other = evaluated(tmp_path / "other", tmp_path / "other.safetensors", *given, "--tasks", "reconstruction")
        assert other["weights"] != whole["weights"]
        assert (other["latents"] == whole["latents"]) is same_latents


def test_outdated_weights_are_refused_by_run_directory_and_accepted_by_file(
    trained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    state, model = read_weights(copy / "weights.safetensors")
    write_weights(copy / "weights.safetensors", state, model, WeightsOrigin(32, "run", steps=100))
    latest = copy / "checkpoints" / "latest"
    latest.parent.mkdir()
    for step in (150, 50):  # resumed, and resumed from an earlier one
        latest.write_text(checkpoint_name(step))
        assert run.main([str(copy), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert f"holds the weights of step 100, but the run's latest checkpoint is step-{step:08d}" in said
        assert f"engine.consolidate {copy} --out {copy}/weights.safetensors`" in said
    given = ("--tasks", "reconstruction", "--data", corpus / "held_out", "--crop", 32)
    evaluated(tmp_path / "file", copy / "weights.safetensors", *given)
    latest.write_text(f"{checkpoint_name(100)}\n")
    evaluated(tmp_path / "out", copy, "--tasks", "reconstruction")


def test_an_exported_directory_has_all_that_zero_shot_needs(trained: Path, corpus: Path, tmp_path: Path) -> None:
    VisualTokenizer.from_run(trained).save_pretrained(tmp_path / "public")
    given = ("--tasks", "zero_shot", "--data", corpus / "held_out", "--crop", 32)
    found = evaluated(tmp_path / "of", tmp_path / "public", *given)
    assert found["zero_shot"] == evaluated(tmp_path / "run", trained, *given)["zero_shot"]


def test_a_hub_name_is_evaluated_as_the_run_that_was_published(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the hub's address when it is imported."""
    asked = ("--tasks", "reconstruction", "--data", corpus / "held_out", "--crop", 32)
    VisualTokenizer.from_run(trained).save_pretrained(tmp_path / "public")
    with serving(tmp_path / "public", "someone/tiny") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        finished = subprocess.run(
            [sys.executable, "-m", "evaluation.run", "hf://someone/tiny@v1", *map(str, asked)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[1]), **settings},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        assert ("HEAD", "/someone/tiny/resolve/v1/config.json", None) in hub.asked
    found = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    whole = evaluated(tmp_path / "run", trained, *asked)
    assert found == whole | {"source": "hf://someone/tiny@v1"}


def test_a_limit_holds_for_both_corpora(trained: Path, tmp_path: Path) -> None:
    found = evaluated(tmp_path, trained, "--tasks", "knn", "--limit", 10)
    assert (found["knn"]["images"], found["knn"]["train_images"]) == (10, 10)


def _on_a_rank(
    _: Ranks, wrong: tuple[Path, EvaluationOptions, Path], right: tuple[Path, EvaluationOptions, Path]
) -> str:
    """The error that the first evaluation ends with; the second writes its results."""
    message = ""
    try:
        run.evaluate(*wrong[:2], out=wrong[2])
    except UserError as error:
        message = str(error)
    run.evaluate(*right[:2], out=right[2])
    return message


def _write_a_label_that_one_rank_meets(folder: Path) -> str:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= {f"{i}.jpg": encoded(i), f"{i}.json": json.dumps({"label": 99 if i == 3 else 0}).encode()}
    return str(write_tar(folder / "0.tar", members))


@pytest.mark.L1
def test_ranks_find_what_one_rank_finds_and_fail_together(
    trained: Path, corpus: Path, network: Path, tmp_path: Path
) -> None:
    asked = [trained, "--tasks", ALL, "--fid", network, "--batch-size", 4]
    alone = evaluated(tmp_path / "alone", *asked)
    right = EvaluationOptions(tasks=tuple(ALL.split(",")), fid=(network,), batch_size=4)
    table = corpus / "held_out" / "classes.json"
    wrong = EvaluationOptions(tasks=("zero_shot",), data=(_write_a_label_that_one_rank_meets(tmp_path),), classes=table)
    messages = run_ranks(_on_a_rank, 2, (trained, wrong, tmp_path), (trained, right, tmp_path / "together"))
    assert (
        messages
        == [
            "a sample has label 99, the class table 5 classes: labels are indices into the table, from 0 on; "
            "give the table of this corpus with --classes"
        ]
        * 2
    )
    found = json.loads((tmp_path / "together" / "evaluation.json").read_text())
    for task in ALL.split(","):
        assert list(found[task]) == list(alone[task])
        for name, value in alone[task].items():
            # Measured 1.2e-7, of rFID, whose sums come in another order; a sample seen twice or not at all gives 1e-2.
            is_number = isinstance(value, float)
            assert found[task][name] == (pytest.approx(value, rel=1e-5) if is_number else value), (task, name)
    assert found["rows"] == alone["rows"]
    best = [
        Image.open(tmp_path / name / "pictures" / "reconstructions_best.png").convert("RGB")
        for name in ("alone", "together")
    ]
    assert np.abs(np.subtract(*(np.asarray(picture, np.int64) for picture in best))).max() <= 1


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that `arguments` end with."""
    assert run.main([*map(str, arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_every_mistake_is_one_line(
    trained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", {"0.jpg": encoded(0), "0.txt": b"no label", "1.jpg": encoded(1)})
    weights, out = tmp_path / "cut.safetensors", ("--out", tmp_path / "out")
    weights.write_bytes((trained / "weights.safetensors").read_bytes()[:-100])
    whole = trained / "weights.safetensors"
    table = ("--classes", corpus / "held_out" / "classes.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    lonely = Path(shutil.copy(whole, bare / "weights.safetensors"))
    state, model = read_weights(whole)
    misfit = tmp_path / "misfit.safetensors"
    write_weights(misfit, state, model.model_copy(update={"latent_channels": 16}))
    empty = write_tar(bare / "empty.tar", {"0.jpg": b"no picture", "0.json": b'{"label": 0}'})
    hashes = write_tar(bare / "hashes.tar", {"0.jpg": encoded(0), "0.json": b'{"label": 123456789012}'})
    named = write_tar(bare / "named.tar", {"0.jpg": encoded(0), "0.json": b'{"label": "dog"}'})
    larger = tmp_path / "larger.json"
    train_bpe([f"{i * i} of {7 * i}" for i in range(300)], 400).save(str(larger))
    astray = tmp_path / "astray.safetensors"
    write_weights(astray, state | {"trunk.norm.weight": torch.full((32,), torch.nan)}, model)
    overflows = tmp_path / "overflows.safetensors"
    write_weights(overflows, {k: v * (1e36 if k.startswith("decoder.") else 1) for k, v in state.items()}, model)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "encode.pt2").touch()
    mistakes: list[tuple[str, tuple[object, ...]]] = [
        ("'rfid' is not one of zero_shot, linear_probe, knn, reconstruction", (trained, "--tasks", "zero_shot,rfid")),
        ("is no run directory", (tmp_path / "nowhere",)),
        ("holds programs of torch.export: loading one may run code from its file", (programs,)),
        ("holds programs of torch.export", (programs / "encode.pt2",)),
        ("is no run directory", (tmp_path,)),
        ("or of the hub hf://OWNER/NAME", ("someone/tiny",)),
        ("hf://tiny is no hub name: those are hf://OWNER/NAME or", ("hf://tiny",)),
        ("hf://some/thing/else is no hub name", ("hf://some/thing/else",)),
        ("there is a directory tests/evaluation here, which would be taken", ("hf://tests/evaluation",)),
        ("is not a safetensors file", (weights, "--data", shards)),
        ("do not fit the model that describes them", (misfit, "--data", shards)),
        ("name labelled shards with --data", (lonely,)),
        ("--train-data", (lonely, "--tasks", "knn", "--data", shards, "--crop", 32)),
        ("give --tokenizer", (lonely, "--data", shards, "--crop", 32, *table)),
        ("--crop 30: sides must be multiples of the patch size 8; give 24", (trained, "--crop", 30)),
        ("--crop 100000: 10,000,000,000 pixels, above data.max_pixels=50,000,000", (trained, "--crop", 100_000)),
        ("the most an image is read with; give 7064 at most", (lonely, "--data", shards, "--crop", 7072)),
        ("--crop 0: give a number from 1 on", (trained, "--crop", 0)),
        ("--limit -1: give a number from 1 on", (trained, "--limit", -1)),
        ("no held-out sample has a label", (trained, "--tasks", "zero_shot", "--data", shards, *table)),
        ("no held-out sample has a label", (trained, "--tasks", "knn", "--data", shards)),
        ("matches no file", (trained, "--tasks", "knn", "--train-data", tmp_path / "*.tar")),
        ("give --classes FILE", (trained, "--data", f"{shards}/0.tar")),
        (
            "none.safetensors cannot be read as safetensors (No such file",
            (trained, "--tasks", "reconstruction", "--lpips", tmp_path / "none.safetensors"),
        ),
        ("does not exist: FID needs a feature network", (trained, "--fid", tmp_path / "none.pth")),
        ("no held-out image could be decoded", (trained, "--tasks", "reconstruction", "--data", empty)),
        ("has label 123456789012: labels number the classes", (trained, "--tasks", "knn", "--data", hashes)),
        ("named/0 has label 'dog', a class name, and there is no", (trained, "--tasks", "knn", "--data", named)),
        ("has label 'dog', a class name, and", (trained, "--tasks", "zero_shot", "--data", named, *table)),
        ("--lpips=", (trained, "--tasks", "reconstruction", "--lpips", tmp_path / "none.safetensors")),
        ("--tokenizer=none.json is no file", (trained, "--tokenizer", "none.json")),
        ("has 400 tokens, the text tower was trained with 300", (trained, "--tokenizer", larger)),
        ("--fid is read by reconstruction, but --tasks is knn", (trained, "--tasks", "knn", "--fid", lonely)),
        ("--train-data is read by linear_probe and knn", (trained, "--train-data", shards)),
        ("SSIM compares windows of 11 x 11 pixels; raise --crop", (trained, "--tasks", "reconstruction", "--crop", 8)),
        ("trunk.norm.weight is not finite", (astray, "--tasks", "reconstruction", "--data", shards)),
        (
            "reconstruction: psnr_db is nan: the weights are finite, but so large",
            (overflows, "--tasks", "reconstruction", "--data", corpus / "held_out", "--crop", 32),
        ),
        ("cut.safetensors cannot be made a directory", (trained, "--out", weights)),
    ]
    for expected, arguments in mistakes:
        assert expected in refused(capsys, *out, *arguments), arguments
    assert not (tmp_path / "out" / "evaluation.json").exists()
