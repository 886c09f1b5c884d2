"""Weights by hub name or directory: saved, found, fetched with the options that were given, or one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from configs import UserError
from model.interchange import main
from model.public_layout import read_public
from model.tokenizer import VisualTokenizer
from model.weights import WeightsOrigin
from tests.model.loopback_hub import COMMIT, serving
from tests.model.test_public_parity import public
from tests.model.tiny_weights import NO_REC, build, tokenizer_of, write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
ROOT = Path(__file__).resolve().parents[2]
IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    VisualTokenizer.from_run(write_run(folder / "run", tiny_config())).save_pretrained(folder / "public")
    return folder / "public"


def test_what_a_run_learnt_is_the_same_bit_for_bit_after_saving_and_loading(saved: Path) -> None:
    run, loaded = VisualTokenizer.from_run(saved.parent / "run"), VisualTokenizer.from_pretrained(saved)
    latent = run.encode(IMAGES)
    assert torch.equal(loaded.encode(IMAGES), latent)
    assert torch.equal(loaded.decode(latent), run.decode(latent))
    assert torch.equal(loaded.embed_images(IMAGES), run.embed_images(IMAGES))
    assert loaded.origin == run.origin
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_what_was_loaded_writes_the_same_again(saved: Path, tmp_path: Path) -> None:
    VisualTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for name in ("README.md", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes(), name
    first, again = load_file(saved / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_a_directory_that_public_code_wrote_loads(tmp_path: Path) -> None:
    """Its file has no word of ours in its metadata, and its config.json nothing but the layout's keys."""
    state, described = public()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(described))
    tokenizer = VisualTokenizer.from_pretrained(tmp_path, attention="matmul")
    assert tokenizer.origin == WeightsOrigin(image_size=64)
    assert tokenizer.encode(torch.rand(1, 3, 64, 64)).shape == (1, 16, 4, 4)
    assert "| training steps | unknown |" in str(tokenizer.generate_model_card())


def test_the_card_says_what_is_known_and_names_what_the_weights_can_do() -> None:
    config = tiny_config("name=mine", "objectives.clip.weight=0", "batch.ssl=0", "objectives.ssl.weight=0")
    origin = WeightsOrigin(image_size=32, name="mine", steps=1200, fingerprint="0123456789abcdef")
    tokenizer = VisualTokenizer.from_state(config.model, build(config).state_dict(), origin=origin)
    card = tokenizer.generate_model_card()
    assert card.data.library_name == "vtp-engine"
    for said in ("# mine", "| training steps | 1,200 |", "0123456789abcdef", "| methods | encode, decode |"):
        assert said in card.text


def test_model_card_kwargs_are_in_the_card(saved: Path, tmp_path: Path) -> None:
    tokenizer = VisualTokenizer.from_pretrained(saved)
    fields = {
        "license": "mit",
        "datasets": ["someone/images"],
        "tags": ["mine"],
        "repo_url": "https://example.com/it",
    }
    tokenizer.save_pretrained(tmp_path / "with_fields", model_card_kwargs=fields)
    card = huggingface_hub.ModelCard.load(tmp_path / "with_fields" / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["someone/images"])
    assert {"mine", "vtp", "visual-tokenizer"} <= set(card.data.tags)
    assert "| licence | mit |" in card.text
    assert "| repo | https://example.com/it |" in card.text
    assert tokenizer.generate_model_card().data.license == "unknown", "fields of one card do not leak into the next"
    with pytest.raises(
        UserError, match=r"licence='mit', which is no field of a model card; the fields are base_model, "
    ):
        tokenizer.save_pretrained(tmp_path / "wrong", model_card_kwargs={"licence": "mit"})
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UserError, match=r"README.md exists and is not overwritten: model_card_kwargs would have no"):
        tokenizer.save_pretrained(tmp_path / "with_fields", model_card_kwargs={"license": "apache-2.0"})


def test_a_card_has_licence_and_task_by_default(saved: Path) -> None:
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.license == "unknown"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "| captions' vocabulary | not in this directory |" in card.text


def test_the_licence_can_be_given_on_the_command_line(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), "--out", str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    assert huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md").data.license == "apache-2.0"


def test_the_captions_vocabulary_is_saved_with_a_text_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = tmp_path / "captions.json"
    vocabulary.write_text("{}")
    run = write_run(tmp_path / "run", tiny_config(f"data.tokenizer={vocabulary}"))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert "vocabulary" not in capsys.readouterr().err
    assert (tmp_path / "public" / "tokenizer.json").read_text() == "{}"
    loaded = VisualTokenizer.from_pretrained(tmp_path / "public")
    assert loaded.vocabulary == str(tmp_path / "public" / "tokenizer.json")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    assert "| captions' vocabulary | `tokenizer.json` |" in (tmp_path / "again" / "README.md").read_text()
    vocabulary.unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "without")]) == 0
    assert f"has no tokenizer.json, the captions' vocabulary: {vocabulary} is not available" in capsys.readouterr().err


def test_weights_without_a_text_tower_need_no_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = tmp_path / "captions.json"
    vocabulary.write_text("{}")
    no_text = ("objectives.clip.weight=0", "batch.ssl=0", "objectives.ssl.weight=0")
    run = write_run(tmp_path / "run", tiny_config(f"data.tokenizer={vocabulary}", *no_text))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert not (tmp_path / "public" / "tokenizer.json").exists()
    assert "vocabulary" not in capsys.readouterr().err


@pytest.fixture
def in_parts(saved: Path, tmp_path: Path) -> Path:
    """The same weights as huggingface_hub writes what is larger than a file may be."""
    folder = tmp_path / "parts"
    folder.mkdir()
    save_torch_state_dict(load_file(saved / "model.safetensors"), folder, max_shard_size=40_000)
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def test_weights_in_several_files_are_those_in_one(saved: Path, in_parts: Path) -> None:
    whole = VisualTokenizer.from_pretrained(saved).state_dict()
    parts = VisualTokenizer.from_pretrained(in_parts).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


BAD_PARTS = {
    "a part is missing": ("does not exist: the public layout is", lambda folder: _parts(folder)[0].unlink()),
    "a part is cut off": ("is cut off or no safetensors", lambda folder: _parts(folder)[0].write_bytes(b"x" * 50)),
    "a part has another's tensors": (
        r"has no .*, though model.safetensors.index.json lists it there",
        lambda folder: _parts(folder)[0].write_bytes(_parts(folder)[1].read_bytes()),
    ),
    "no JSON": ("is not JSON", lambda folder: _index(folder, "{")),
    "a list": ("has no weight_map", lambda folder: _index(folder, "[]")),
    "an empty map": ("has no weight_map", lambda folder: _index(folder, '{"weight_map": {}}')),
    "a way out": (
        r"puts norm into '\.\./other.safetensors': only",
        lambda folder: _index(folder, '{"weight_map": {"norm": "../other.safetensors"}}'),
    ),
    "a pickle": (
        r"puts norm into 'norm.bin': only",
        lambda folder: _index(folder, '{"weight_map": {"norm": "norm.bin"}}'),
    ),
    "a number": (r"puts norm into 1: only", lambda folder: _index(folder, '{"weight_map": {"norm": 1}}')),
}


@pytest.mark.parametrize("what", BAD_PARTS)
def test_parts_that_do_not_fit_together_are_one_clear_error(what: str, in_parts: Path) -> None:
    message, spoil = BAD_PARTS[what]
    spoil(in_parts)
    with pytest.raises(UserError, match=message):
        VisualTokenizer.from_pretrained(in_parts)


def test_a_hub_name_with_weights_in_several_files_is_fetched_and_then_found_without_the_hub(
    in_parts: Path, tmp_path: Path
) -> None:
    (in_parts / "more.safetensors").write_bytes(b"")
    (in_parts / "tokenizer.json").write_text("{}")
    load = "V.from_pretrained('someone/large', cache_dir=argv[1], local_files_only={})"
    shown = "print(t.origin.image_size, t.vocabulary); t.vocabulary = 'someone/large@v2'; print(t.vocabulary_file())"
    with serving(in_parts, "someone/large") as hub:
        fetched = fetch(hub.url, tmp_path, f"{load.format(False)}; t = {load.format(True)}; {shown}")
    [size, read], [named] = (line.split() for line in fetched.stdout.splitlines())
    assert size == "32"
    assert read.endswith(f"{COMMIT}/tokenizer.json"), "beside the weights"
    assert named.endswith(f"{COMMIT}/tokenizer.json"), "where a run names a vocabulary of the hub"
    assert ("HEAD", "/someone/large/resolve/v2/tokenizer.json", None) in hub.asked
    assert not any(path.endswith("more.safetensors") for _, path, _ in hub.asked), "only what the index names"


def test_a_hub_name_without_weights_is_one_clear_error(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    with serving(folder, "someone/bare") as hub:
        missing = fetch(hub.url, tmp_path, "V.from_pretrained('someone/bare', cache_dir=argv[1])")
    last = missing.stderr.splitlines()[-1]
    assert "UserError: someone/bare is no directory and the hub did not deliver it (" in last
    assert "index.json" not in last, "it names the file that was asked for first"


def fetch(hub: str, cache: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process whose hub is at `hub`: huggingface_hub reads the address when it is imported."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    start = "from sys import argv; import torch; from model.tokenizer import VisualTokenizer as V; "
    return subprocess.run(
        [sys.executable, "-c", start + code, str(cache)],
        cwd=ROOT,
        env={**os.environ, "NO_PROXY": "127.0.0.1", **settings},
        capture_output=True,
        text=True,
    )


def test_a_hub_name_is_fetched_with_revision_token_and_cache_and_then_found_without_the_hub(
    saved: Path, tmp_path: Path
) -> None:
    with serving(saved, "someone/tiny") as hub:
        fetched = fetch(
            hub.url,
            tmp_path,
            "V.from_pretrained('someone/tiny', revision='v1', token='hf_secret', cache_dir=argv[1]);"
            "t = V.from_pretrained('someone/tiny', revision='v1', cache_dir=argv[1], local_files_only=True);"
            "print(t.origin.name)",
        )
        assert fetched.stdout == "tiny\n", fetched.stderr
        asked = list(hub.asked)
        missing = fetch(hub.url, tmp_path, "V.from_pretrained('someone/else', cache_dir=argv[1])")
    assert ("HEAD", "/someone/tiny/resolve/v1/config.json", "Bearer hf_secret") in asked
    assert any(path.endswith(f"/resolve/{COMMIT}/model.safetensors") for _, path, _ in asked), "both of one commit"
    assert {token for _, path, token in asked if path.startswith("/someone/")} == {"Bearer hf_secret"}
    assert not any(path.endswith("README.md") for _, path, _ in asked), "only what is read is fetched"
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    assert read_public(snapshot)[2] == VisualTokenizer.from_pretrained(saved).origin
    assert "UserError: someone/else is no directory and the hub did not deliver it (" in missing.stderr


def test_pushing_hands_the_three_files_to_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, bytes] = {}

    class Url:
        repo_id = "someone/tiny"

    def upload(_api: object, *, folder_path: Path, repo_id: str, revision: str, **_: object) -> str:
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return f"https://hub/{repo_id}/{revision}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: Url)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert VisualTokenizer.from_pretrained(saved).push_to_hub("someone/tiny", branch="try") == (
        "https://hub/someone/tiny/try"
    )
    assert sorted(pushed) == ["README.md", "config.json", "model.safetensors"]
    assert pushed["config.json"] == (saved / "config.json").read_bytes()


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_directory_without_one_of_the_files_is_one_clear_error(saved: Path, tmp_path: Path, lost: str) -> None:
    for name in {"config.json", "model.safetensors"} - {lost}:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    with pytest.raises(UserError, match=f"{lost} does not exist: the public layout is"):
        VisualTokenizer.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match="no bottleneck"):
        tokenizer_of(tiny_config(*NO_REC)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="image size these weights were trained at"):
        tokenizer_of(tiny_config()).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_name_that_is_none_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="a/b/c is no directory and the hub did not deliver it"):
        VisualTokenizer.from_pretrained("a/b/c")
