"""Each objective's share of the gradient, out of the one backward pass of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import Config, UserError, load_run
from engine.reporting.step_meter import GradFractions
from model.initialise import initialise
from model.losses.comm import Comm, Solo
from model.losses.total import StepLosses, compute_losses
from model.outputs import Outputs
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import model_inputs, random_batch, tiny_config

CPU = torch.device("cpu")


def forward(model: Pretrainer, config: Config) -> tuple[StepLosses, Outputs, Tensor]:
    """Losses and outputs, and what the trunk gave."""
    caught: list[Tensor] = []
    handle = model.trunk.register_forward_hook(lambda module, given, x_TD: caught.append(x_TD))
    outputs = model(**model_inputs(random_batch(config, 0)))
    handle.remove()
    return compute_losses(outputs, config.objectives, 0.05, Solo()), outputs, caught[0]


@pytest.mark.L0
@pytest.mark.parametrize("overrides", [(), ("model.bottleneck_ae_only=false",), ("model.image_feature=patch_mean",)])
def test_shares_are_those_of_three_backward_passes(overrides: tuple[str, ...]) -> None:
    config = tiny_config(*overrides)
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1), "matmul")
    initialise(model, config)
    expected: dict[str, float] = {}
    for place, name in enumerate(("clip", "ssl", "rec")):  # a forward each: the loss over prototypes runs back once
        losses, outputs, x_TD = forward(model, config)
        objective = losses.objectives[place]
        assert objective.name == name
        at = x_TD if config.model.bottleneck_ae_only else outputs.branch_features[name]
        [gradient] = torch.autograd.grad(objective.weight * objective.value, at)
        expected[f"health/grad_share/{name}"] = float(gradient.norm())
    total = sum(expected.values())

    shares = GradFractions(2, CPU)
    losses, outputs, _ = forward(model, config)
    shares.watch(0, outputs.branch_features)
    assert shares.read(Solo()) == {}, "step 0 is not the last of two"
    shares.watch(1, outputs.branch_features)
    losses.total.backward()
    found = shares.read(Solo())
    assert shares.read(Solo()) == {}
    # Measured: equal to 1e-7.
    assert found == pytest.approx({name: norm / total for name, norm in expected.items()}, rel=1e-5)


def shares_of_a_step(comm: Comm, stage: str, parts_of_clip: int) -> dict[str, float]:
    config = tiny_config("system.checks.shares_every=1", f"system.clip.micro_batches={parts_of_clip}")
    parts = ranks.build(config, comm, stage)
    ranks.run_steps(parts, config, comm, 0, 1)
    return parts.grad_fractions.read(comm)


@pytest.mark.L1
def test_shares_know_no_stage_no_ranks_and_no_micro_batches() -> None:
    [whole] = run_ranks(shares_of_a_step, 1, "zero2", 1)
    assert set(whole) == {f"health/grad_share/{name}" for name in ("clip", "ssl", "rec")}
    assert sum(whole.values()) == pytest.approx(1)
    for world_size, stage, parts in ((2, "zero3", 1), (1, "zero3", 2)):
        # Sums over ranks round differently, and KoLeo and Sinkhorn see all ranks' rows.
        assert run_ranks(shares_of_a_step, world_size, stage, parts)[0] == pytest.approx(whole, rel=1e-4)


@pytest.mark.L0
@pytest.mark.parametrize("override", ["shares_every=7", "alarms.latent_std=[0.5, 2]"])
def test_other_kinds_of_runs_refuse_it(override: str) -> None:
    asked: Any = [f"system.checks.{override}", "latents.train=somewhere"]
    with pytest.raises(UserError, match=r"looks at what pre-training alone has"):
        load_run("configs/dit_b.yaml", asked)
