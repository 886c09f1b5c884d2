"""Digests pin a run to the content of its input files at any path: captions' tokenizer, LPIPS weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import Config, DecoderGan, UserError, fingerprint, load_run
from configs.load import science_changes
from data.captions import train_bpe, with_tokenizer_digest
from engine.initial_weights import with_digests as with_digests
from engine.launch import parse, preflight
from evaluation.run import EvaluationOptions, EvaluationSetup, _perceptual
from evaluation.tokenizer_source import open_tokenizer
from tests.data.tar_shards import write_corpus
from tests.engine.small_runs import write_checkpoint
from tests.engine.tasks.decoder_gan_runs import stage_config
from tests.model.tiny_weights import write_run
from tests.tiny import TINY, tiny_config

pytestmark = pytest.mark.L0
LPIPS = "objectives.rec.perceptual=1"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Shards, the same vocabulary in two places and another in a third, LPIPS weights likewise."""
    write_corpus(tmp_path, num_shards=2, per_shard=6)
    for name, words in (("one", "red green"), ("copy", "red green"), ("other", "blue white")):
        train_bpe([words] * 4, 300).save(str(tmp_path / f"{name}.json"))
        save_file({"w": torch.tensor([float(len(words))])}, tmp_path / f"{name}.safetensors", {"made": name})
    return tmp_path


def arguments(here: Path, tokenizer: str, lpips: str, *more: str) -> list[str]:
    run = (f"name=r{tokenizer}", f"system.run_dir={here}/run", f"data.train={here}/*.tar", "data.streams=2", LPIPS)
    files = (f"data.tokenizer={here}/{tokenizer}.json", f"objectives.rec.lpips_weights={here}/{lpips}.safetensors")
    return ["--config", str(TINY), *run, *files, "model.text.vocab=512", *more]


def preflight_config(here: Path) -> Config:
    config = preflight(parse(arguments(here, "one", "one")))[0]
    assert isinstance(config, Config)
    return config


def test_the_unchanged_files_at_another_path_go_on(here: Path) -> None:
    write_checkpoint(here / "run" / "checkpoints", preflight_config(here))
    config, _, resume, _ = preflight(parse(arguments(here, "copy", "copy", "--resume")))
    assert resume
    assert fingerprint(config) == fingerprint(saved_config(here))


def saved_config(here: Path) -> Config:
    config = load_run(here / "run" / "checkpoints" / "step-00000003" / "config.yaml")
    assert isinstance(config, Config)
    return config


@pytest.mark.parametrize(
    ("file", "key"),
    [("one.json", "data.tokenizer"), ("one.safetensors", "objectives.rec.lpips_weights")],
)
def test_another_file_at_the_same_path_is_refused(here: Path, file: str, key: str) -> None:
    write_checkpoint(here / "run" / "checkpoints", preflight_config(here))
    (here / "other").with_suffix(Path(file).suffix).replace(here / file)
    with pytest.raises(UserError, match=r"was trained with other settings \(.*_sha256: .* -> ") as error:
        preflight(parse(arguments(here, "one", "one", "--resume")))
    assert f"({key}={here}/{file} holds another file)" in str(error.value)


def test_a_checkpoint_without_digests_goes_on_with_the_path_it_names(here: Path) -> None:
    """One of an earlier version: until it is saved again, its paths are all that is known of the files."""
    earlier = load_run(TINY, arguments(here, "one", "one")[2:])
    assert isinstance(earlier, Config)
    write_checkpoint(here / "run" / "checkpoints", earlier)
    assert preflight(parse(arguments(here, "one", "one", "--resume")))[0].seed == earlier.seed
    with pytest.raises(UserError, match=r"other settings \(data.tokenizer: .*one.json -> .*other.json\)"):
        preflight(parse(arguments(here, "other", "one", "--resume")))


def test_a_digest_that_is_given_must_be_the_files(here: Path) -> None:
    wrong = f"data.tokenizer_sha256={'0' * 64}"
    with pytest.raises(UserError, match=r"one.json has the digest .*; give the one that was meant, or remove data.tok"):
        preflight(parse(arguments(here, "one", "one", wrong)))
    with pytest.raises(UserError, match=r"lpips_sha256=0+ of no file: give objectives.rec.lpips_weights too"):
        tiny_config(f"objectives.rec.lpips_sha256={'0' * 64}")


def test_a_perceptual_term_that_is_off_needs_no_file(here: Path) -> None:
    config = preflight(parse(arguments(here, "one", "nowhere", "objectives.rec.perceptual=0")))[0]
    assert isinstance(config, Config)
    assert config.objectives.rec.lpips_sha256 is None


def test_stage_2_pins_its_perceptual_weights(here: Path) -> None:
    tokenizer = write_run(here / "run", tiny_config()) / "weights.safetensors"

    def config(name: str) -> DecoderGan:
        rec = {"perceptual": 1, "lpips_weights": str(here / f"{name}.safetensors")}
        return stage_config(tokenizer, objectives={"rec": rec})

    one, copy, other = (config(name) for name in ("one", "copy", "other"))
    assert fingerprint(one) == fingerprint(copy) != fingerprint(other)
    assert science_changes(one, copy) == []
    assert [change.partition(":")[0] for change in science_changes(one, other)] == ["objectives.rec.lpips_sha256"]


def test_evaluation_refuses_files_that_the_run_was_not_trained_with(here: Path) -> None:
    config = tiny_config(f"data.tokenizer={here}/one.json", "model.text.vocab=512", LPIPS,
                         f"objectives.rec.lpips_weights={here}/one.safetensors")  # fmt: skip
    config = with_digests(config.model_copy(update={"data": with_tokenizer_digest(config.data)}), resume=False)
    source = open_tokenizer(write_run(here / "run", config), torch.device("cpu"))
    assert source.caption_encoder().vocab_size <= 512
    for name in ("one.json", "one.safetensors"):
        (here / "other").with_suffix(Path(name).suffix).replace(here / name)
    with pytest.raises(UserError, match=r"is not the file the text tower was trained with .*--tokenizer"):
        source.caption_encoder()
    with pytest.raises(UserError, match=r"is not the file the run was trained with .*--lpips"):
        _perceptual(EvaluationSetup(source, EvaluationOptions(tasks=(), data=("a.tar",)), torch.device("cpu"), here))
