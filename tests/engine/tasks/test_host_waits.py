"""Neither does a step of stage 2 or of a generator wait for the device (tests/engine/test_host_sync.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from configs import DecoderGan
from configs.generator import GeneratorConfig
from configs.load import validate
from model.losses.comm import Comm
from tests import stream_stand_in
from tests.data.latents.stores import write_public_store
from tests.engine.tasks import decoder_gan_runs as runs
from tests.engine.tasks import small
from tests.engine.test_host_sync import BOUNDS, HostReads
from tests.harness import run_ranks
from tests.model.tiny_weights import write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1


def without_bounds(seen: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in seen.items() if not name.endswith(BOUNDS)}


def of_stage_2(comm: Comm, config: DecoderGan) -> dict[str, int]:
    """Of a step in which both models learn."""
    waits = stream_stand_in.install()
    training = runs.build(config, comm, "zero3")
    runs.run_steps(training, comm, 0, runs.STEPS - 1)
    batch = runs.pictures(config, runs.STEPS - 1, comm)
    waits.clear()
    with HostReads() as reads:
        training.step(batch)
    return without_bounds(reads.seen + waits)


def test_a_step_of_stage_2_waits_for_nothing(tmp_path: Path) -> None:
    weights = write_run(tmp_path / "run", tiny_config()) / "weights.safetensors"
    gan = {"balance": "adaptive", "discriminator_start": 0.33, "start": 0.5}
    config = runs.stage_config(weights, objectives={"gan": gan}, optim={"precision": "bf16"})
    assert run_ranks(of_stage_2, 1, config) == [{}]


def of_a_generator(comm: Comm, configs: list[GeneratorConfig], root: Path) -> list[dict[str, int]]:
    waits = stream_stand_in.install()
    found = []
    for number, config in enumerate(configs):
        training = small.build(config, comm, "zero1", root / str(number))
        batches = training.data.batches(0)
        for _ in range(2):
            training.step(next(batches))
        batch = next(batches)
        waits.clear()
        with HostReads() as reads:
            training.step(batch)
        training.data.close()
        found.append(without_bounds(reads.seen + waits))
    return found


def test_a_step_of_a_generator_waits_for_nothing(tmp_path: Path) -> None:
    store = write_public_store(tmp_path / "store", [40, 24], (8, 4, 4))
    size: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}
    kinds: tuple[dict[str, Any], ...] = (
        {"model": "diffusion"},
        {
            "model": "diffusion",
            "objective": "noise",
            "variance": "learnt",
            "direction": 0,
            "times": {"kind": "uniform"},
        },
        {"model": "autoregressive", "buffer": 4, "head": {"width": 32, "depth": 2}},
    )
    tree = {"kind": "generator", "name": "tiny", "latents": {"train": str(store)}, "batch": {"samples": 12}}
    configs = [
        validate(tree | {"generator": size | kind, "optim": {"steps": 6}}, "a test", GeneratorConfig) for kind in kinds
    ]
    assert run_ranks(of_a_generator, 1, configs, tmp_path) == [[{}, {}, {}]]
