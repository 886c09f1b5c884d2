"""The process launcher above a rank (`deepspeed`, `torchrun`): the variables it sets, and ending when it is gone.

    rank_environment()      # {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8}; those of a single rank without a launcher
    end_with_launcher()     # at the start of a rank: a thread polls the launcher processes once a second

A killed `deepspeed` would leave its ranks running unnoticed. `deepspeed` starts `python -m deepspeed.launcher.launch`,
which starts the ranks, so every ancestor process that is a launcher is watched. A rank whose launcher has ended sends
itself SIGTERM: before its first step it ends at once, later it saves at the next report (engine/health/guard.py). A
rank that a shell or a scheduler started may outlive it.

Why not prctl(PR_SET_PDEATHSIG): it covers the parent process alone, and fires when the *thread* that started us ends.

Imports no torch: a start reads the variables before anything heavy is loaded.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

from configs import UserError
from engine.complaint import complain

SINGLE_RANK = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
LAUNCHER_PROGRAMS = ("deepspeed", "ds", "torchrun")  # by path, or as the script of an interpreter
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed")  # of python -m
POLL_SECONDS = 1.0


def rank_environment() -> dict[str, int]:
    """Read RANK, LOCAL_RANK and WORLD_SIZE from the environment; unset ones are those of a single rank.

    Raises UserError where one is not a number, or RANK is not below WORLD_SIZE.
    """
    given = {name: os.environ[name] for name in SINGLE_RANK if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(
                f"{name}={value!r} in the environment is not a number: a launcher sets it for every rank; start the "
                f"run with one, or `unset {' '.join(given)}` to run alone"
            )
    values = SINGLE_RANK | {name: int(value) for name, value in given.items()}
    is_beyond = {"RANK", "WORLD_SIZE"} <= given.keys() and values["RANK"] >= values["WORLD_SIZE"]
    if is_beyond or values["WORLD_SIZE"] < 1:
        raise UserError(
            f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']} in the environment: ranks are counted from 0 "
            "to WORLD_SIZE - 1; start the run with a launcher, which sets both, or unset both to run alone"
        )
    return values


def end_with_launcher() -> None:
    """Start a thread that ends this rank when its launcher ends; nothing where no launcher started it."""
    if "RANK" in os.environ and (launchers := launcher_pids(os.getpid())):
        threading.Thread(target=_watch, args=(launchers,), name="launcher watch", daemon=True).start()


def launcher_pids(pid: int) -> list[int]:
    """List the process ids of the launchers above a process, the nearest first."""
    pids: list[int] = []
    while (pid := _parent(pid)) > 1 and _is_launcher(pid):
        pids.append(pid)
    return pids


def _watch(launchers: list[int]) -> None:
    """Wait until a process of the chain has another parent, then send SIGTERM to this one."""
    chain = (os.getpid(), *launchers)
    while all(_parent(child) == parent for child, parent in pairwise(chain)):
        time.sleep(POLL_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        complain("the launcher of these ranks has ended: they save at the next report and end, as at SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(pid: int) -> int:
    """Return the parent's process id; 0 where the process has ended, or this system has no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_launcher(pid: int) -> bool:
    """Whether the command line of a process is a launcher's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    is_module = any(flag == "-m" and name.startswith(LAUNCHER_MODULES) for flag, name in pairwise(words[:4]))
    return is_module or any(Path(word).name in LAUNCHER_PROGRAMS for word in words[:2])
