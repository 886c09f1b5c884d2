"""Gathering across hosts first and then inside is gathering: the same rows, losses and gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from engine import distributed
from engine.distributed import HierarchicalRanks, gather_comm
from model.losses.clip import sigmoid_clip_loss, softmax_clip_loss
from model.losses.comm import Comm
from model.losses.koleo import koleo_loss
from tests.harness import run_ranks

pytestmark = pytest.mark.L1

ROWS, WIDTH = 4, 8


def losses(comm: Comm, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    return {
        "softmax": softmax_clip_loss(image, text, torch.tensor([20.0]), comm).loss,
        "sigmoid": sigmoid_clip_loss(image, text, torch.tensor([20.0]), torch.tensor([-10.0]), comm).loss,
        "koleo": koleo_loss(image, comm),
    }


def told(comm: Comm) -> dict[str, tuple[float, Tensor, Tensor]]:
    """By objective: the loss of this rank, and its gradients at its own rows."""
    found = {}
    generator = torch.Generator().manual_seed(comm.rank)
    image, text = torch.randn(2, ROWS, WIDTH, generator=generator)
    for name in ("softmax", "sigmoid", "koleo"):
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        loss = losses(comm, *leaves)[name]
        loss.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        found[name] = (loss.item(), *grads)
    return found


def both_ways(comm: Comm, per_host: int) -> dict[str, Any]:
    by_host = HierarchicalRanks(comm, per_host, timeout_minutes=1)
    own = torch.arange(2.0 * 3).view(2, 3) + 100 * comm.rank
    sent: list[tuple[str, int]] = []
    with distributed.observe_collectives(lambda kind, num_bytes: sent.append((kind, num_bytes))):
        rows = by_host.gather_with_grad(own)
    return {
        "rows": (comm.gather_with_grad(own), rows),
        "losses": (told(comm), told(by_host)),
        "sums": (comm.all_sum(own), by_host.all_sum(own), comm.all_max(own), by_host.all_max(own)),
        "place": (by_host.rank, by_host.world_size),
        "is a comm": isinstance(by_host, Comm),
        "sent": sent,
        "per host": per_host,
    }


@pytest.fixture(scope="module", params=[(4, 2), (6, 3), (6, 2)], ids=["2 x 2", "2 x 3", "3 x 2"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    ranks, per_host = request.param
    return run_ranks(both_ways, ranks, per_host)


def test_rows_come_in_the_order_of_ranks_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank, heard in enumerate(found):
        flat, by_host = heard["rows"]
        assert torch.equal(flat, by_host)
        assert by_host[::2, 0].tolist() == [100.0 * r for r in range(len(found))]
        assert torch.equal(by_host, found[0]["rows"][1]), "all ranks have the same"
        assert heard["place"] == (rank, len(found))
        assert heard["is a comm"]
        assert torch.equal(*heard["sums"][:2])
        assert torch.equal(*heard["sums"][2:])


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "koleo"])
def test_losses_are_the_same_and_gradients_to_rounding(found: list[dict[str, Any]], name: str) -> None:
    for heard in found:
        (flat, *flat_grads), (by_host, *grads) = (each[name] for each in heard["losses"])
        assert by_host == flat, "nothing is summed on the way there"
        for mine, theirs in zip(grads, flat_grads, strict=True):
            # Sums over ranks in another order: worst seen 2e-7 of gradients up to 3. A row of another rank is off by 1.
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    assert any(grad.abs().max() > 1e-3 for grad in found[0]["losses"][0][name][1:])


def arranged(comm: Comm, here: list[int], way: str) -> tuple[bool, str]:
    os.environ["LOCAL_SIZE"] = str(here[comm.rank])
    try:
        chosen, said = gather_comm(comm, way, timeout_minutes=1)
    except UserError as error:
        return False, str(error)
    return isinstance(chosen, HierarchicalRanks), said


@pytest.mark.parametrize(
    ("here", "way", "is_by_host", "words"),
    [
        ([2] * 4, "by_host", True, "across 2 hosts, then inside (system.gather=by_host)"),
        ([2] * 4, "flat", False, "flat (system.gather)"),
        ([4] * 4, "by_host", False, "flat (1 hosts of 4: there is one way alone)"),
        ([3, 3, 3, 1], "by_host", False, "of which hosts have 1 and 3"),
    ],
)
def test_the_way_is_chosen_by_what_the_launcher_started_on_each_host(
    here: list[int], way: str, is_by_host: bool, words: str
) -> None:
    for chosen, said in run_ranks(arranged, len(here), here, way):
        assert chosen is is_by_host
        assert words in said


def test_own_blocks_travel_across_and_what_came_of_each_host_inside(found: list[dict[str, Any]]) -> None:
    """A message is a whole output: of the ranks in the same place of every host, then of all ranks."""
    block = 2 * 3 * 4  # bytes
    for heard in found:
        num_hosts = len(found) // heard["per host"]
        assert heard["sent"] == [("all_gather", num_hosts * block), ("all_gather", len(found) * block)]
