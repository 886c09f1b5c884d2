"""Our weights to the public layout and back, on the command line: exact, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs import fingerprint
from model.interchange import main
from model.origin import Origin
from model.tokenizer import VisualTokenizer
from model.weights import read_origin, read_weights
from tests.model.tiny_weights import NO_REC, write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_a_run_exports_to_the_public_layout_and_comes_back_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 0
    ours, _ = read_weights(run / "weights.safetensors")
    back, _ = read_weights(tmp_path / "back.safetensors")
    kept = {name for name in ours if name.split(".")[0] not in ("teacher", "prototypes")}
    assert back.keys() == kept
    assert all(torch.equal(back[name], ours[name]) for name in kept)
    images = torch.rand(1, 3, 32, 32)
    latents = [
        VisualTokenizer.from_run(run).encode(images),
        VisualTokenizer.from_file(tmp_path / "back.safetensors").encode(images),
    ]
    assert torch.equal(*latents)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.registers=2",), "model.registers=2"),
        (("model.clip_width=16",), "model.clip_width=16"),
        (NO_REC, "no bottleneck"),
    ],
)
def test_what_the_public_layout_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config(*overrides))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "public").exists()


@pytest.mark.parametrize(
    ("old", "changed", "message"),
    [
        ('"text_pool_type": "argmax"', '"text_pool_type": "last"', "text_pool_type='last'"),
        ('"vision_depth": 2', '"vision_depth": 3', "trunk.blocks.2.norm1.weight: found nothing"),
        ('"vision_depth": 2', '"vision_depth": 1', "tensors are not of the VTP layout"),
        (
            '"vision_patch_size": 8',
            '"vision_patch_size": 4',
            "trunk.patch_embed.proj.weight: found shape (32, 3, 8, 8)",
        ),
        ('"vision_num_heads": 2', '"vision_num_heads": 4', "another RoPE"),
        ('"text_depth": 1,', "", "no text_depth"),
        ('"model_type": "vtp"', '"model_type": "llama"', "model_type='llama': it describes no VTP tokenizer"),
        (
            '"text_depth": 1,',
            '"text_depth": 1, "text_rope": true,',
            "text_rope=True, which the VTP layout does not know",
        ),
        ('"vision_depth": 2', '"vision_depth": "deep"', "no model of ours: depth 'deep'"),
        ("{\n", "", "is not JSON"),
    ],
)
def test_a_public_directory_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, changed: str, message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    main(["export", str(run), "--out", str(tmp_path / "public")])
    described = (tmp_path / "public" / "config.json").read_text()
    assert old in described
    (tmp_path / "public" / "config.json").write_text(described.replace(old, changed, 1))
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()


def test_what_hugging_face_adds_to_a_config_does_no_harm(tmp_path: Path) -> None:
    main(["export", str(write_run(tmp_path / "run", tiny_config())), "--out", str(tmp_path / "public")])
    path = tmp_path / "public" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"transformers_version": "4.50", "torch_dtype": "float32"})
    )
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 0


def test_what_is_known_of_the_weights_travels_along(tmp_path: Path) -> None:
    config = tiny_config("name=travels")
    run = write_run(tmp_path / "run", config)
    main(["export", str(run), "--out", str(tmp_path / "public")])
    main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")])
    found = read_origin(tmp_path / "back.safetensors")
    assert found == Origin(image_size=32, name="travels", steps=None, fingerprint=fingerprint(config))
    assert json.loads((tmp_path / "public" / "config.json").read_text())["image_size"] == 32


def test_a_public_file_that_is_cut_off_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(write_run(tmp_path / "run", tiny_config())), "--out", str(tmp_path / "public")])
    weights = tmp_path / "public" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert "model.safetensors is cut off or no safetensors file" in capsys.readouterr().err


def test_an_out_of_the_other_kind_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    for asked, kind in (
        (["export", run, "--out", run / "weights.safetensors"], "a file"),
        (["programs", run, "--out", run / "weights.safetensors"], "a file"),
        (["import", tmp_path / "public", "--out", tmp_path], "a directory"),
        (["import", tmp_path / "public", "--out", run / "weights.safetensors" / "x"], "File exists"),
    ):
        assert main([str(argument) for argument in asked]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert kind in line


def test_missing_files_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "public")]) == 2
    assert main(["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "back")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("nowhere" in error for error in errors)
