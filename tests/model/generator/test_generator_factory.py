"""A generator's file: all that sampling needs, and one clear error for each way it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs import UserError
from model.generator.factory import GENERATOR_KEY, LoadedGenerator, read_generator, write_generator
from model.generator.sampling import Sampling
from model.generator.tokens import LatentShape
from tests.model.generator.tiny_generator import KINDS, NUM_CLASSES, SHAPE, alive, rows, section

pytestmark = pytest.mark.L0
MEAN, STD = torch.tensor([0.1, -3.0, 7e-5]), torch.tensor([1.0, 1 / 3, 2e4])


def written(path: Path, kind: str = "lightningdit") -> Path:
    settings = section(**KINDS[kind])
    write_generator(path, alive(settings).state_dict(), settings, SHAPE, NUM_CLASSES, MEAN, STD, "ab12")
    return path


def described(path: Path) -> dict[str, object]:
    with safe_open(path, "pt") as stored:
        return json.loads(stored.metadata()[GENERATOR_KEY])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path) -> None:
    loaded = read_generator(written(tmp_path / "g.safetensors", kind))
    original = alive(section(**KINDS[kind]))
    assert (loaded.section, loaded.shape, loaded.num_classes) == (section(**KINDS[kind]), SHAPE, NUM_CLASSES)
    assert loaded.tokenizer == "ab12"
    assert torch.equal(loaded.mean_L, MEAN)
    assert torch.equal(loaded.std_L, STD)
    assert not loaded.module.training
    state = loaded.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    how = Sampling("ddim" if kind == "dit" else "euler", steps=3, guidance=2.0)
    draws = rows(original.sampling_draw_counts(how))
    labels = torch.arange(6) % NUM_CLASSES
    assert torch.equal(loaded.module.sample(labels, how, draws), original.sample(labels, how, draws))


def test_denormalised_latents_have_the_corpuss_mean_and_deviation() -> None:
    generator = alive(section())
    loaded = LoadedGenerator(generator, section(), SHAPE, NUM_CLASSES, MEAN, STD, None)
    normalised = torch.randn(2, 3, 4, 2)
    back = (loaded.denormalised(normalised) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(back, normalised, atol=1e-4, rtol=1e-4)


def test_a_missing_and_a_truncated_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.safetensors does not exist"):
        read_generator(tmp_path / "none.safetensors")
    path = written(tmp_path / "g.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is not a safetensors file, or is cut off"):
        read_generator(path)


@pytest.mark.parametrize(
    ("metadata", "found"), [({"model": "{}"}, "weights of a tokenizer"), (None, "tensors without a description")]
)
def test_a_file_of_another_kind_is_named(metadata: dict[str, str] | None, found: str, tmp_path: Path) -> None:
    save_file({"trunk.norm.weight": torch.ones(3)}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(UserError, match=f"{found}.*not a generator"):
        read_generator(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("section", {"model": "diffusion", "width": 16, "depth": 2, "heads": 2, "colour": "red"}),
        ("shape", [3, 4]),
        ("num_classes", None),
        ("mean", "large"),
        ("tokenizer", ...),
    ],
)
def test_a_description_of_another_version_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = written(tmp_path / "g.safetensors")
    changed = described(path) | {key: value}
    if value is ...:
        del changed[key]
    save_file(load_file(path), path, {GENERATOR_KEY: json.dumps(changed)})
    with pytest.raises(UserError, match="describes a generator of another version"):
        read_generator(path)


def test_tensors_that_are_not_the_described_generators_are_refused(tmp_path: Path) -> None:
    path, name = written(tmp_path / "g.safetensors"), "backbone.embed.linear.weight"
    metadata, state = {GENERATOR_KEY: json.dumps(described(path))}, load_file(path)
    for changed, message in (
        (
            {key: value for key, value in state.items() if key != name},
            rf"{name} is missing, the generator .* \(16, 3\)",
        ),
        (state | {name: torch.zeros(16, 4)}, rf"{name} is \(16, 4\), the generator it describes has \(16, 3\)"),
        (state | {"surplus": torch.zeros(1)}, "surplus has no place"),
    ):
        save_file(changed, path, metadata)
        with pytest.raises(UserError, match=message):
            read_generator(path)


def test_a_shape_that_the_section_cannot_take_is_refused_by_its_rule(tmp_path: Path) -> None:
    settings = section(patch=2)
    state = alive(settings).state_dict()
    write_generator(tmp_path / "g", state, settings, LatentShape(3, 5, 2), NUM_CLASSES, MEAN, STD, None)
    with pytest.raises(UserError, match="does not divide latents of 5x2"):
        read_generator(tmp_path / "g")
