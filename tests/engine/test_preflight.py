"""What preflight refuses: a wrong environment, an impossible run directory, a resume with nothing left to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from data.captions import train_bpe
from engine import consolidate
from engine.exits import MISTAKE
from engine.launch import MAX_PATH_BYTES, parse, preflight
from engine.launcher import SINGLE_RANK
from model.weights import read_weights
from tests.data.tar_shards import write_corpus
from tests.engine.small_runs import write_checkpoint
from tests.tiny import TINY

pytestmark = pytest.mark.L0


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_corpus(tmp_path, num_shards=2, per_shard=6)
    train_bpe(["red green"] * 4, 300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def arguments(here: Path, *more: str) -> list[str]:
    data = (f"data.train={here}/*.tar", "data.streams=2", f"data.tokenizer={here}/tokenizer.json")
    return ["--config", str(TINY), *data, f"system.run_dir={here}/run", "model.text.vocab=512", *more]


def write_small_checkpoint(here: Path, step: int) -> Path:
    return write_checkpoint(here / "run" / "checkpoints", preflight(parse(arguments(here)))[0], step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": ""}, "RANK='' in the environment is not a number: .* `unset RANK` to run alone"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment .* `unset RANK WORLD_SIZE`"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in the environment is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 in the environment: ranks are counted from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment: ranks are counted from 0"),
    ],
)
def test_wrong_launcher_variables_are_one_line(
    here: Path, given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SINGLE_RANK:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        preflight(parse(arguments(here)))


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("x" * 300, "system.run_dir: a name in it has 300 bytes: file systems take 255"),
        ("/".join(["x" * 200] * 20), f"would have up to .* bytes, and the system allows {MAX_PATH_BYTES}"),
        ('"a\\0b"', "is not a directory path"),
        ("''", "is not a directory path"),
    ],
)
def test_a_run_directory_that_cannot_be_made_is_refused(here: Path, run_dir: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(parse(arguments(here, f"system.run_dir={run_dir}")))


def test_a_resume_past_optim_steps_is_refused(here: Path) -> None:
    write_small_checkpoint(here, step=6)
    assert preflight(parse(arguments(here, "--resume")))[2], "as many: its weights are written again"
    with pytest.raises(UserError, match=r"step-00000006 has 6 steps done, but optim.steps=5: .* raise optim.steps, or"):
        preflight(parse(arguments(here, "--resume", "--allow-change", "optim.steps", "optim.steps=5")))


def test_allowed_changes_may_be_written_with_spaces(here: Path) -> None:
    write_small_checkpoint(here, step=3)
    changes = ("optim.lr=2e-3", "seed=5")
    allowed = preflight(parse(arguments(here, "--resume", "--allow-change", " optim.lr, seed ", *changes)))[3]
    assert allowed == ("optim.lr", "seed")


def test_an_archive_is_written_from_a_run_directory_and_names_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_small_checkpoint(here, step=3)
    assert consolidate._checkpoints_of(here / "run") == consolidate._checkpoints_of(written.parent) == written.parent
    for directory, error in (
        (here / "nowhere", f"error: {here}/nowhere is not a directory: give a run directory, runs/NAME"),
        (here, f"error: {here} has no complete checkpoint (a directory with SHA256SUMS)\n"),
    ):
        assert consolidate.main([str(directory), "--out", str(here / "w.safetensors")]) == MISTAKE
        assert capsys.readouterr().err.startswith(error)


def test_the_error_for_missing_weights_names_the_command_that_writes_them(here: Path) -> None:
    write_small_checkpoint(here, step=3)
    weights = here / "run" / "weights.safetensors"
    with pytest.raises(UserError, match=f"engine.consolidate {here}/run --out {weights}` writes the weights of"):
        read_weights(weights)
    with pytest.raises(UserError, match="once training wrote them; check the path"):
        read_weights(here / "weights.safetensors")
