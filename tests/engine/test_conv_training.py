"""The convolutional autoencoder in the engine: under ZeRO-3, on 1 rank and on 2, resumed, checkpointed, as graphs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from configs import Config
from engine.step import train_step
from model.losses.comm import Comm
from profiling.cost.communication import by_kind
from profiling.cost.communication import predict_collectives as communication
from profiling.cost.peak_memory import predict_states as footprint
from tests.engine import ranks
from tests.harness import run_ranks
from tests.profiling import test_communication, test_footprint
from tests.tiny import CONV, of_all_rows, random_batch, tiny_config

KL = ("model.latent=gaussian", "objectives.rec.kl=1e-6")


def conv_config(*overrides: str) -> Config:
    return tiny_config(*CONV, *KL, *overrides)


def learn_one_batch(comm: Comm, config: Config, steps: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Every step on the batch of step 0, its pictures of one colour each: noise could not be learned."""
    parts, losses = ranks.build(config, comm, "zero3"), []
    batch = random_batch(config, 0, comm.rank, comm.world_size)
    coloured = batch.images[:, :, :1, :1].expand_as(batch.images).contiguous()
    for step in range(steps):
        record = train_step(parts, replace(batch, step=step, images=coloured), None, config)
        losses.append({name: float(comm.all_sum(x)) / comm.world_size for name, x in record.losses.items()})
    return losses, ranks.outcome(parts, []).weights


@pytest.mark.L2
def test_under_zero_3_two_ranks_learn_to_reconstruct() -> None:
    config = conv_config("optim.steps=32", "optim.lr=2e-2", "optim.clip_norm=10")
    losses, _ = run_ranks(learn_one_batch, 2, config, 32)[0]
    assert losses[-1]["l1"] < 0.85 * losses[0]["l1"]  # 0.36 of 0.46
    assert {"l1", "kl", "latent_std", "rec", "total"} <= losses[0].keys()


@pytest.mark.L1
def test_two_ranks_take_the_steps_that_one_takes() -> None:
    config = conv_config()
    [(alone, mine)] = run_ranks(learn_one_batch, 1, config, 4)
    shared, theirs = run_ranks(learn_one_batch, 2, config, 4)[0]
    for one, other in zip(alone, shared, strict=True):
        assert of_all_rows(one) == pytest.approx(
            of_all_rows(other), rel=1e-5
        )  # worst seen 3e-6, at ten times this rate
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.L1
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(tmp_path: Path) -> None:
    config = conv_config("objectives.rec.noise.kind=interpolative")
    whole, resumed = run_ranks(ranks.save_and_go_on, 2, config, tmp_path / "checkpoints")[0]
    assert whole == resumed


def losses_of(comm: Comm, cases: list[Config]) -> tuple[list[list[float]], int, int]:
    """Three steps of each case; graphs and breaks of all, which no backend compiles: that takes minutes."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="eager")  # of this process, which ends with the test
    losses = [ranks.train(comm, config, "zero3", 3).losses for config in cases]
    return losses, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.L2
def test_checkpointing_and_graphs_change_nothing() -> None:
    """Of the tiny model's 16 residual blocks many are alike: one graph for all of a shape."""
    modes = [f"system.activation_checkpointing={mode}" for mode in ("off", "selective", "full")]
    cases = [conv_config("system.compile=off", mode) for mode in modes]
    (off, selective, full, graphs), count, breaks = run_ranks(losses_of, 2, [*cases, conv_config("system.compile=on")])[
        0
    ]
    assert off == selective == full == graphs
    assert (count, breaks) == (11, 0)


@pytest.mark.L1
def test_what_a_step_sends_and_holds_is_what_is_predicted() -> None:
    config = conv_config("system.compile=off")
    sent = (config, test_communication.ds_of(config, "zero3", 2, test_communication.SPLIT))
    [(found, calls)] = run_ranks(test_communication.counted, 2, [sent])[0]
    assert found == by_kind(communication(*sent, 2))
    assert calls == test_communication.num_messages(sent, 2)
    states = (config, test_footprint.ds_of(config, "zero3", 2))
    held = run_ranks(test_footprint.held, 2, *states)[0]
    assert held == pytest.approx(footprint(*states, 2).static_bytes, abs=2 * test_footprint.STRAY_BYTES)
