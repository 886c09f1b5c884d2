"""A generator trains on the same engine: any world size, any ZeRO stage, stopped and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from configs.generator import GeneratorConfig
from configs.load import validate
from data.latents.store import LatentStore
from engine import consolidate
from engine.checkpoint import reading
from engine.checkpoint.tensor_ranges import AVERAGE
from engine.tasks.frozen_tokenizer import with_latents_digest
from model.generator.draws import draw
from model.generator.factory import read_generator
from model.generator.sampling import Sampling
from model.losses.comm import Comm
from tests.data.latents.stores import write_public_store
from tests.engine.tasks import small as trainings
from tests.harness import run_ranks

pytestmark = pytest.mark.L1

SHAPE = (8, 4, 4)
SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}
AUTOREGRESSIVE = SMALL | {"model": "autoregressive", "buffer": 4, "head": {"width": 32, "depth": 2}}
KINDS = {
    "diffusion": SMALL | {"model": "diffusion"},
    "masked": AUTOREGRESSIVE,
    "random": AUTOREGRESSIVE | {"order": "random"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_public_store(tmp_path_factory.mktemp("latents") / "store", [40, 24], SHAPE)


def tiny(store: Path, **changed: Any) -> GeneratorConfig:
    tree = {
        "kind": "generator",
        "name": "tiny",
        "latents": {"train": str(store)},
        "batch": {"samples": 12},
        "generator": KINDS["diffusion"],
        "ema": 0.5,
        "optim": {"steps": 6, "lr": 1e-2, "lr_batch": 12, "warmup": 0.0, "final_lr": 1.0, "precision": "fp32"},
    }
    return validate(tree | changed, "a test", GeneratorConfig)


def whole_and_halves(comm: Comm, config: GeneratorConfig, stage: str, root: Path) -> list[dict[str, Any]]:
    whole = trainings.train(comm, config, stage, root / "whole", 6)
    half = trainings.train(comm, config, stage, root / "half", 3)
    rest = trainings.train(comm, config, stage, root / "rest", 6, start_from=root / "half" / "checkpoints")
    return [whole, half, rest]


@pytest.mark.parametrize("stage", ["zero3", "zero1"])
def test_six_steps_equal_three_and_three_bitwise(store: Path, tmp_path: Path, stage: str) -> None:
    whole, half, rest = run_ranks(whole_and_halves, 2, tiny(store), stage, tmp_path)[0]
    assert half["losses"] + rest["losses"] == whole["losses"]
    assert [name for name, values in whole["weights"].items() if not torch.equal(values, rest["weights"][name])] == []
    averages = [
        reading.full_weights(reading.latest_readable(tmp_path / run / "checkpoints"), AVERAGE)
        for run in ("whole", "rest")
    ]
    assert [name for name, values in averages[0].items() if not torch.equal(values, averages[1][name])] == []
    assert len(set(whole["losses"])) == 6


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        pytest.param("diffusion", 3, marks=pytest.mark.L2),
        ("masked", 2),
        pytest.param("random", 2, marks=pytest.mark.L2),
    ],
)
def test_a_step_is_the_same_on_any_number_of_ranks(store: Path, tmp_path: Path, kind: str, most: int) -> None:
    config, losses = tiny(store, generator=KINDS[kind]), {}
    for world_size in range(1, most + 1):
        found = run_ranks(trainings.train, world_size, config, "zero3", tmp_path / str(world_size), 4)[0]
        losses[world_size] = found["losses"]
    # Sums over ranks round differently: worst seen 3e-7. Noise of another position would differ in the first digits.
    assert all(found == pytest.approx(losses[1], rel=1e-5) for found in losses.values())


def averaged_by_hand(comm: Comm, config: GeneratorConfig, run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights after each step, averaged outside of the engine, beside what the checkpoint holds."""
    average: dict[str, Any] = {}
    for step in range(4):  # one run of each length: every step's weights are those of the run that ends there
        weights = trainings.train(comm, config, "zero2", run_dir / str(step), step)["weights"]
        for name, values in weights.items():
            average[name] = values if not step else config.ema * average[name] + (1 - config.ema) * values
    stored = reading.full_weights(reading.latest_readable(run_dir / "3" / "checkpoints"), AVERAGE)
    return average, {f"model/{name}": values for name, values in stored.items()}


def test_the_average_is_that_of_the_weights_of_every_step(store: Path, tmp_path: Path) -> None:
    by_hand, stored = run_ranks(averaged_by_hand, 2, tiny(store), tmp_path)[0]
    assert by_hand.keys() == stored.keys()
    for name, values in stored.items():
        torch.testing.assert_close(values, by_hand[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_run_ends_in_a_file_that_samples(store: Path, tmp_path: Path) -> None:
    config = with_latents_digest(tiny(store))
    run_ranks(trainings.train, 2, config, "zero3", tmp_path / "run", 2)
    consolidate.write_weights_file(
        reading.latest_readable(tmp_path / "run" / "checkpoints"), tmp_path / "weights.safetensors"
    )
    loaded = read_generator(tmp_path / "weights.safetensors")
    of = LatentStore(store)
    assert (loaded.shape.channels, loaded.shape.height, loaded.num_classes) == (8, 4, of.num_classes)
    assert torch.equal(loaded.mean_L, of.mean)
    sampling = Sampling("euler", steps=2, guidance=2.0)
    draws = draw(loaded.module.sampling_draw_counts(sampling), seed=0, step=0, positions=torch.arange(3).numpy())
    assert loaded.module.sample(torch.tensor([0, 1, 3]), sampling, draws).shape == (3, *SHAPE)


def resume_with(comm: Comm, config: GeneratorConfig, run_dir: Path, checkpoint: Path) -> str:
    try:
        trainings.train(comm, config, "zero3", run_dir, 4, start_from=checkpoint)
    except UserError as error:
        return str(error)
    return "went on"


def test_a_run_does_not_go_on_with_other_latents(store: Path, tmp_path: Path) -> None:
    run_ranks(trainings.train, 1, tiny(store), "zero3", tmp_path / "run", 2)
    other = write_public_store(tmp_path / "other", [50], SHAPE)
    [said] = run_ranks(resume_with, 1, tiny(other), tmp_path / "run2", tmp_path / "run" / "checkpoints")
    assert said.startswith(f"--resume: latents.train={other} has another mean")


def test_latents_of_another_tokenizer_are_refused(store: Path) -> None:
    config = tiny(store, latents={"train": str(store), "tokenizer": "abc"})
    with pytest.raises(UserError, match=r"was made by the tokenizer None, but latents.tokenizer=abc"):
        with_latents_digest(config)


def test_settings_of_tokenizers_are_refused(store: Path) -> None:
    with pytest.raises(UserError, match=r"system.linear=fp8_torchao is for pre-training tokenizers"):
        tiny(store, system={"linear": "fp8_torchao"})
