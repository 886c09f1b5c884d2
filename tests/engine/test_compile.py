"""Compiled blocks under ZeRO-3: no graph break, one graph per layout, nothing compiled after the second step."""

from functools import partial
from typing import Any

import pytest
import torch

from engine.build import MAX_GRAPHS
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import step_that_hides, tiny_config

pytestmark = pytest.mark.L1


def count(comm: Comm, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """Dynamo's counters after every step, and the step's loss."""
    from torch._dynamo.utils import counters

    config = tiny_config("system.compile=on", *overrides)
    parts = ranks.build(config, comm, "zero3")
    seen = []
    for step in range(steps):
        [loss], _ = ranks.run_steps(parts, config, comm, step, step + 1)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        seen.append({"loss": loss, "graphs": graphs, "breaks": breaks})
    return seen


@pytest.mark.parametrize(
    ("world_size", "overrides", "graphs"),
    [
        pytest.param(2, (), 6, marks=pytest.mark.L2),
        (1, ("model.trunk.drop_path=0.4", "system.activation_checkpointing=selective"), 5),
    ],
)
def test_blocks_compile_to_few_graphs_without_breaks_or_late_recompiles(
    world_size: int, overrides: tuple[str, ...], graphs: int
) -> None:
    seen = run_ranks(count, world_size, 4, *overrides, timeout=300.0)[0]
    assert [step["breaks"] for step in seen] == [0, 0, 0, 0]
    # Four layouts: the student's packed sequence, the teacher's global crops (no gradient), the decoder, the captions;
    # and the last blocks of student and teacher, whose MLPs see only what is read (with drop_path the teacher's alone).
    assert seen[0]["graphs"] == graphs
    assert seen[-1]["graphs"] == seen[1]["graphs"]
    eager = run_ranks(ranks.train, world_size, tiny_config("system.compile=off", *overrides), "zero3", 4)[0]
    # Fused kernels round differently: worst seen 4e-7.
    assert [step["loss"] for step in seen] == pytest.approx(eager.losses, rel=1e-5)


def count_graphs_of_micro_batches(comm: Comm) -> tuple[int, int]:
    """Graphs and breaks of one step; counted by Dynamo before a backend compiles anything, so none does."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="eager")  # of this process, which ends with the test
    config = tiny_config("system.compile=on", "data.streams=2", "batch.rec=4", "system.clip.micro_batches=3")
    ranks.run_steps(ranks.build(config, comm, "zero3"), config, comm, 0, 1)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def count_graphs_of_hidden_patches(comm: Comm) -> list[tuple[int, int]]:
    """As above, after a step of each number of hidden patches."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="eager")
    config, found = tiny_config("system.compile=on", "objectives.rec.mask=[-0.1,0.7]"), []
    parts = ranks.build(config, comm, "zero3")
    for hidden in range(0, 14, 2):
        step = step_that_hides(config, hidden)
        ranks.run_steps(parts, config, comm, step, step + 1)
        found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return found


def test_every_number_of_hidden_patches_has_two_graphs_and_all_are_fewer_than_the_limit() -> None:
    """The blocks of the student's trunk, and its last."""
    found = run_ranks(count_graphs_of_hidden_patches, 1)[0]
    assert found == [(6 + 2 * number, 0) for number in range(7)]
    assert found[-1][0] < MAX_GRAPHS


def test_micro_batches_share_their_graphs() -> None:
    """Beside the six of a step without parts: clip rows with and without gradient, each with a last block; captions."""
    assert run_ranks(count_graphs_of_micro_batches, 1)[0] == (11, 0)
