"""Runs a function on several gloo ranks of this machine (with `-m gpu` on one, and its GPU) and brings back what each
returned.

    def double(comm, x):               # at the top of a test module: the new processes find it by name
        return comm.all_sum(torch.tensor(x))

    run_ranks(double, 2, 3)            # [tensor(6), tensor(6)]

Ranks are forked from a helper process that has imported what they need (tests/preload.py), so a call costs a fraction
of a second. Each rank computes with one thread. The first rank to fail ends the others and its traceback is the test's
failure; ranks that hang are killed and their stacks shown.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_SECONDS = 3.0  # what other ranks get to end by themselves after one has failed


class RanksFailed(Exception):
    """At least one rank raised, died or hung; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0, join: bool = True
) -> list[Any]:
    """`function(comm, *arguments)` on `world_size` ranks; results in rank order.

    Function, arguments and results must pickle. `timeout` in seconds bounds the whole call. With join=False
    no process group is formed and `function(*arguments)` runs with the launcher's variables set, as a
    launcher leaves them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        # Pickled by plain pickle: multiprocessing would share tensor memory with processes that end first.
        task = pickle.dumps((function, arguments))
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, task, timeout, join), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: Path, task: bytes, timeout: float, join: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu"),
    )  # fmt: skip
    import torch

    from engine import distributed

    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(max(timeout - 1.0, timeout / 2), file=stack)
        try:
            function, arguments = pickle.loads(task)
            if join:
                comm = distributed.start(timeout / 60, rendezvous=f"file://{folder}/rendezvous")
                distributed.barrier()  # a rank that is done at once must not leave while others still connect to it
                arguments = (comm, *arguments)
            result = pickle.dumps(function(*arguments))
            (folder / f"{rank}.result").write_bytes(result)
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            raise SystemExit(1) from None  # at once, so that nobody waits for this rank
        finally:
            faulthandler.cancel_dump_traceback_later()
        distributed.stop()


def _wait(ranks: Sequence[BaseProcess], folder: Path, deadline: float) -> None:
    """Returns when all ranks ended well; raises RanksFailed when one did not, soon after it."""
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.005)
    if any(process.exitcode != 0 for process in ranks):
        raise RanksFailed(_describe(ranks, folder))


def _describe(ranks: Sequence[BaseProcess], folder: Path) -> str:
    """The tracebacks of the ranks that raised, earliest first, and where others were when time was up."""
    raised = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    reports = [f"rank {path.stem} of {len(ranks)} raised:\n{path.read_text()}" for path in raised]
    for rank, process in enumerate(ranks):
        if process.exitcode is None:
            reports.append(f"rank {rank} of {len(ranks)} hung:\n{(folder / f'{rank}.stack').read_text()}")
        elif process.exitcode != 0 and not (folder / f"{rank}.error").exists():
            reports.append(f"rank {rank} of {len(ranks)} died with exit code {process.exitcode}")
    return "\n".join(reports)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
