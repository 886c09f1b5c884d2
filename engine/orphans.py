"""Ends ranks whose launcher is gone: a killed `deepspeed` would leave them at work, unseen.

    end_with_launcher()         # at the start of a rank; a thread looks once a second

Looked at are the process that started this rank and those that started it in turn, as far as they are launchers:
`deepspeed` starts `python -m deepspeed.launcher.launch`, which starts the ranks. A rank whose launcher has ended sends
itself SIGTERM: before its first step it ends at once, later it saves at the next report (engine/health/guard.py). A
rank that a shell or a scheduler started may outlive it.

Why not prctl(PR_SET_PDEATHSIG): it knows no grandparents, and comes already when the *thread* ends that started us.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

from engine.complaint import complain

PROGRAMS = ("deepspeed", "ds", "torchrun")  # by path, or as the script of an interpreter
MODULES = ("deepspeed.launcher", "torch.distributed")  # of python -m
LOOK_EVERY = 1.0  # seconds


def end_with_launcher() -> None:
    """Starts to look, where a launcher has started this process."""
    if "RANK" in os.environ and (chain := launchers(os.getpid())):
        threading.Thread(target=_wait, args=(chain,), name="launcher watch", daemon=True).start()


def launchers(pid: int) -> list[int]:
    """The launchers that a process has been started by, the nearest first."""
    found: list[int] = []
    while (pid := _parent(pid)) > 1 and _is_launcher(pid):
        found.append(pid)
    return found


def _wait(chain: list[int]) -> None:
    while all(_parent(child) == parent for child, parent in zip((os.getpid(), *chain), chain, strict=False)):
        time.sleep(LOOK_EVERY)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        complain("the launcher of these ranks has ended: they save at the next report and end, as at SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(pid: int) -> int:
    """0 where the process has ended, or this system has no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    is_module = any(flag == "-m" and name.startswith(MODULES) for flag, name in pairwise(words[:4]))
    return is_module or any(Path(word).name in PROGRAMS for word in words[:2])
