"""Slurm's part in a job on this machine: its variables, and an `srun` and `scontrol` that do what theirs are told to.

    slurm = Slurm(folder, num_tasks=2)
    job = slurm.started(script, "runs/a", "--config", ...)     # as slurmd starts the batch script
    job.send_signal(signal.SIGUSR1)                            # as --signal=B:USR1@300 does
    slurm.requeued                                             # ["4711"], the job ids given to `scontrol requeue`

`srun` starts every task here, on as many "nodes" as there are tasks; it passes signals on and exits with the largest
exit code of its tasks, both as srun(1) says. It refuses an option that it does not know.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

JOB_ID = 4711

SRUN = """#!{python}
import argparse, os, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--kill-on-bad-exit", type=int, choices=(0, 1), required=True)
parser.add_argument("--wait", type=float, required=True)
options, command = parser.parse_known_args()
if command[0].startswith("-"):
    sys.exit(f"srun: unknown option {{command[0]}}")
tasks = []
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for task in range({num_tasks}):
    own = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_NODEID": str(task)}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
deadline = None
while any(task.poll() is None for task in tasks):
    if deadline is None and any(task.poll() is not None for task in tasks):
        deadline = time.monotonic() + options.wait
    is_bad = options.kill_on_bad_exit and any(task.poll() not in (None, 0) for task in tasks)
    if is_bad or (deadline is not None and time.monotonic() > deadline):
        for task in tasks:
            task.kill()
    time.sleep(0.01)
sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))
"""

SCONTROL = """#!/bin/bash
case "$1 $2 $3" in
    "show hostnames "*) printf '%s\\n' localhost node2;;
    requeue*) echo "$2" >> '{folder}/requeued';;
    *) exit 1;;
esac
"""


@dataclass(frozen=True)
class Slurm:
    """One job of `num_tasks` tasks; `folder` keeps its commands and what it asked for."""

    folder: Path
    num_tasks: int

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        scripts = {
            "srun": SRUN.format(python=sys.executable, num_tasks=self.num_tasks),
            "scontrol": SCONTROL.format(folder=self.folder),
        }
        for name, script in scripts.items():
            (self.folder / "bin" / name).write_text(script)
            (self.folder / "bin" / name).chmod(0o755)

    @property
    def log(self) -> Path:
        """What --output and --open-mode=append make."""
        return self.folder / "job.log"

    @property
    def requeued(self) -> list[str]:
        """The jobs that were queued again."""
        asked = self.folder / "requeued"
        return asked.read_text().split() if asked.exists() else []

    def started(self, script: Path, *arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
        """The batch script on the job's first node."""
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable,
            "SLURM_JOB_ID": str(JOB_ID), "SLURM_JOB_NODELIST": "localhost,node2", "SLURM_NNODES": str(self.num_tasks),
            "SLURM_NTASKS": str(self.num_tasks), "SLURM_NTASKS_PER_NODE": "1",
        }  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(["bash", script, *arguments], cwd=cwd, env=environment, stdout=log, stderr=log)
