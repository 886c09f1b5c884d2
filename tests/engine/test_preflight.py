"""What a start refuses before anything heavy: surroundings that cannot be, and a resume that has nothing to do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from configs import UserError, fingerprint, to_yaml
from data.captions import train_bpe
from engine import archive
from engine.archive import State
from engine.checkpoint.directory import SUMS, sum_of
from engine.exits import MISTAKE
from engine.launch import LONGEST_PATH, parse, preflight
from engine.launcher_numbers import launcher_numbers
from model.weights import read_weights
from tests.data.tar_shards import write_corpus
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


def write_checkpoint(here: Path, step: int) -> Path:
    config = preflight(parse(arguments(here)))[0]
    path = here / "run" / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    state = State(step, optimizer_steps={"model": step}, world_size=1, fingerprint=fingerprint(config), shapes={})
    (path / "state.json").write_text(json.dumps(asdict(state)))
    (path / SUMS).write_text("".join(sum_of(path / name) for name in ("config.yaml", "state.json")))
    return path


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
def test_half_an_environment_of_a_launcher_is_one_line(
    here: Path, given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        preflight(parse(arguments(here)))


def test_a_rank_knows_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert launcher_numbers() == {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("x" * 300, "system.run_dir: a name in it has 300 bytes: file systems take 255"),
        ("/".join(["x" * 200] * 20), f"would have up to .* bytes, and the system takes {LONGEST_PATH}"),
        ('"a\\0b"', "is not a directory path"),
        ("''", "is not a directory path"),
    ],
)
def test_a_run_directory_that_cannot_be_made_is_refused(here: Path, run_dir: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(parse(arguments(here, f"system.run_dir={run_dir}")))


def test_fewer_steps_than_are_done_is_said(here: Path) -> None:
    write_checkpoint(here, step=6)
    assert preflight(parse(arguments(here, "--resume")))[2], "as many: its weights are written again"
    with pytest.raises(UserError, match=r"step-00000006 has 6 steps done, but optim.steps=5: .* raise optim.steps, or"):
        preflight(parse(arguments(here, "--resume", "--allow-change", "optim.steps", "optim.steps=5")))


def test_allowed_changes_may_be_written_with_spaces(here: Path) -> None:
    write_checkpoint(here, step=3)
    changes = ("optim.lr=2e-3", "seed=5")
    allowed = preflight(parse(arguments(here, "--resume", "--allow-change", " optim.lr, seed ", *changes)))[3]
    assert allowed == ("optim.lr", "seed")


def test_an_archive_is_written_from_a_run_directory_and_says_what_it_misses(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_checkpoint(here, step=3)
    assert archive._checkpoints_in(here / "run") == archive._checkpoints_in(written.parent) == written.parent
    for given, says in (
        (here / "nowhere", f"error: {here}/nowhere is not a directory: give a run directory, runs/NAME"),
        (here, f"error: {here} has no complete checkpoint (a directory with SHA256SUMS)\n"),
    ):
        assert archive.main([str(given), "--out", str(here / "w.safetensors")]) == MISTAKE
        assert capsys.readouterr().err.startswith(says)


def test_a_run_that_is_not_over_is_told_how_to_get_its_weights(here: Path) -> None:
    write_checkpoint(here, step=3)
    weights = here / "run" / "weights.safetensors"
    with pytest.raises(UserError, match=f"`python -m engine.archive {here}/run --out {weights}` writes the weights of"):
        read_weights(weights)
    with pytest.raises(UserError, match="once training wrote them; check the path"):
        read_weights(here / "weights.safetensors")
