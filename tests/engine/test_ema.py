"""The sharded EMA is the EMA."""

import pytest
import torch

from engine import zero
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1

MOMENTUM, STEPS = 0.9996, 100


def drift(comm: Comm, stage: str, precision: str) -> dict[str, torch.Tensor]:
    """The teacher after STEPS of following a student that is moved by known amounts; whole fp32 averages by name."""
    config = tiny_config(f"optim.precision={precision}")
    parts = ranks.build(config, comm, stage)
    ranks.run_steps(parts, config, comm, 0, 1)  # DeepSpeed's state exists after a first step
    assert parts.teacher is not None
    start = {pair.name: pair.average.clone() for pair in parts.teacher.shards}
    for step in range(STEPS):
        for fragment in zero.fragments(parts.engine):
            fragment.write("fp32", value_at(fragment.name, fragment.start, fragment.numel, step))
        zero.sync_from_masters(parts.engine)
        parts.teacher.update(MOMENTUM)
    return {
        pair.name: torch.stack((torch.full_like(pair.average, pair.start), start[pair.name], pair.average))
        for pair in parts.teacher.shards
    }


def value_at(name: str, start: int, numel: int, step: int) -> torch.Tensor:
    """What the student's flattened parameter holds at this step, whoever computes it."""
    places = torch.arange(start, start + numel, dtype=torch.float64)
    return (torch.sin(places * 0.37 + len(name)) + 0.01 * step).float()


@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_sharded_ema_equals_single_process_ema_after_100_steps(stage: str) -> None:
    for shares in run_ranks(drift, 2, stage, "fp32"):
        for name, (starts, before, after) in shares.items():
            expected = before.double()
            for step in range(STEPS):
                expected = (
                    MOMENTUM * expected + (1 - MOMENTUM) * value_at(name, int(starts[0]), len(before), step).double()
                )
            # Worst seen 6e-7, fp32 rounding of 100 steps. A bf16 average would not have moved at all.
            assert (after.double() - expected).abs().max() < 1e-6, name
            assert (after - before).abs().max() > 1e-3, name


def published(comm: Comm, stage: str) -> list[tuple[str, float]]:
    """After real steps: the distance between the model's own teacher and the rounded fp32 averages of all ranks."""
    config = tiny_config("optim.precision=bf16", "teacher.momentum=0.5")
    parts = ranks.build(config, comm, stage)
    ranks.run_steps(parts, config, comm, 0, 3)
    assert parts.teacher is not None
    distances = []
    for pair in parts.teacher.shards:
        with zero.gathered([pair.teacher]):
            whole = pair.teacher.detach().flatten().clone()
        own = whole[pair.start : pair.start + pair.average.numel()]
        distances.append((pair.name, float((own - pair.average.bfloat16()).abs().max()) if own.numel() else 0.0))
    return distances


@pytest.mark.parametrize("stage", ["zero3", "zero1"])
def test_the_model_sees_the_rounded_average_at_once(stage: str) -> None:
    for distances in run_ranks(published, 2, stage):
        assert [name for name, distance in distances if distance] == []
