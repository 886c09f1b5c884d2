"""Ranks find each other, agree, share, and name themselves when something breaks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from engine import distributed
from model.losses.comm import Comm, Solo
from tests.harness import RanksFailed, run_ranks

ROOT = Path(__file__).resolve().parents[2]


def speak(comm: Comm) -> dict[str, Any]:
    """Every operation of the door once; rank r contributes r + 1."""
    own = torch.full((2, 3), comm.rank + 1.0)
    leaf = own.clone().requires_grad_()
    gathered = comm.gather_with_grad(leaf)
    # Rank r weighs row i of the gathered matrix by (r + 1) * i.
    weight = (comm.rank + 1) * torch.arange(float(len(gathered)))[:, None]
    (weight * gathered).sum().backward()
    distributed.barrier()
    return {
        "comm": isinstance(comm, Comm),
        "place": (comm.rank, comm.world_size, distributed.rank(), distributed.world_size(), distributed.is_first()),
        "device": str(distributed.device()),
        "gathered": gathered.detach(),
        "grad": leaf.grad,
        "transposed": comm.gather_with_grad(torch.arange(6.0).view(2, 3).T),
        "sum": comm.all_sum(leaf),
        "max": comm.all_max(own),
        "kept": own,
        "any": [distributed.any_rank(comm.rank == 1), distributed.any_rank(False)],
        "told": distributed.broadcast_object({"from": comm.rank}),
    }


@pytest.mark.L1
def test_two_ranks_gather_reduce_agree_and_hear_rank_zero() -> None:
    for rank, heard in enumerate(run_ranks(speak, 2)):
        own = torch.full((2, 3), rank + 1.0)
        assert heard["comm"]
        assert heard["place"] == (rank, 2, rank, 2, rank == 0)
        assert heard["device"] == "cpu"
        assert heard["gathered"][:, 0].tolist() == [1, 1, 2, 2]
        # The sum over ranks (1 + 2 = 3) of the weights of this rank's two rows, not their mean.
        assert heard["grad"][:, 0].tolist() == [3.0 * (2 * rank), 3.0 * (2 * rank + 1)]
        assert torch.equal(heard["transposed"], torch.arange(6.0).view(2, 3).T.repeat(2, 1))
        assert torch.equal(heard["sum"], torch.full((2, 3), 3.0))
        assert not heard["sum"].requires_grad
        assert torch.equal(heard["max"], torch.full((2, 3), 2.0))
        assert torch.equal(heard["kept"], own)
        assert heard["any"] == [True, False]
        assert heard["told"] == {"from": 0}


@pytest.mark.L0
def test_alone_without_a_group_everything_is_the_identity() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.broadcast_object([1]) == [1]
    distributed.barrier()
    distributed.stop()
    x = torch.ones(2, requires_grad=True)
    assert Solo().gather_with_grad(x) is x
    assert not Solo().all_sum(x).requires_grad
    assert isinstance(Solo(), Comm)


@pytest.mark.L1
def test_without_a_launcher_a_run_is_a_world_of_one() -> None:
    program = (
        "from engine import distributed; import torch; comm = distributed.start(1); "
        "print(comm.rank, comm.world_size, comm.gather_with_grad(torch.ones(2)).sum().item()); distributed.stop()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in distributed.LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("0 1 2.0\n", "")


def meet_at_the_launchers_address() -> tuple[int, int]:
    comm = distributed.start(1)
    assert distributed.any_rank(comm.rank == 0)
    return comm.rank, comm.world_size


@pytest.mark.L1
def test_ranks_meet_at_the_address_the_launcher_sets() -> None:
    assert run_ranks(meet_at_the_launchers_address, 2, join=False) == [(0, 2), (1, 2)]


@pytest.mark.L0
def test_half_set_launcher_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 is set but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        distributed.start(1)


@pytest.mark.L0
def test_a_taken_port_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        port = str(other_run.getsockname()[1])
        for name, value in zip(distributed.LAUNCHER_VARIABLES, ("0", "2", "0", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"port {port} of this machine is taken.*--master_port"):
            distributed.start(2 / 60)


def leave_early(comm: Comm) -> None:
    distributed.barrier()  # before it, the other rank may still be connecting and would fail there
    if comm.rank == 0:
        os._exit(7)
    comm.all_sum(torch.ones(3))


def never_arrive() -> None:
    if os.environ["RANK"] == "0":
        distributed.start(2 / 60)


@pytest.mark.L1
def test_a_broken_collective_and_a_missing_rank_are_told_with_the_rank() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: all_sum of \(3,\) failed") as failure:
        run_ranks(leave_early, 2)
    assert "rank 0 of 2 died with exit code 7" in str(failure.value)
    with pytest.raises(RanksFailed, match="rank 0 of 2: not all ranks met at"):
        run_ranks(never_arrive, 2, join=False)


def fail_on_rank_one(comm: Comm) -> None:
    if comm.rank == 1:
        raise KeyError("the reason")
    distributed.barrier()


def hang_on_rank_one(comm: Comm) -> int:
    if comm.rank == 1:
        time.sleep(60)
    return comm.rank


@pytest.mark.L1
def test_the_harness_shows_the_first_failure_and_where_a_rank_hangs() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)^rank 1 of 2 raised:.*KeyError: 'the reason'"):
        run_ranks(fail_on_rank_one, 2)
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2 hung:.*hang_on_rank_one"):
        run_ranks(hang_on_rank_one, 2, timeout=6.0)
    assert time.monotonic() - begin < 12.0
