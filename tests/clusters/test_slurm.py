"""docs/clusters/train.sbatch, run as Slurm runs a batch script; Slurm itself is played (tests/clusters/slurm.py)."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from engine.exits import FAILED, LOST_RANK, MISTAKE, STOPPED
from tests.clusters.slurm import JOB_ID, Slurm
from tests.engine.small_runs import (
    ROOT,
    WAIT_SECONDS,
    arguments,
    reported,
    wait_until,
    write_shards,
)  # fmt: skip

SCRIPT = ROOT / "docs" / "clusters" / "train.sbatch"
STEPS = 24
TRAINING = (f"optim.steps={STEPS}", "optim.warmup=0.0")
# Of sbatch(1), those that the script uses.
OPTIONS = {
    "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+",
    "exclusive": "", "time": r"\d+:\d\d:\d\d", "signal": r"B:USR1@\d+", "requeue": "", "open-mode": "append",
    "output": r"\S+",
}  # fmt: skip


def asked_of_sbatch() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.L0
def test_the_script_is_bash_and_asks_sbatch_for_what_there_is() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    asked = asked_of_sbatch()
    assert asked.keys() == OPTIONS.keys()
    assert [name for name, value in asked.items() if not re.fullmatch(OPTIONS[name], value)] == []
    assert asked["ntasks-per-node"] == asked["gpus-per-node"], "a task is a rank, and a rank has a GPU"
    head = SCRIPT.read_text().split("#SBATCH")[-1]
    assert "#SBATCH" not in head, "sbatch reads no option after the first command"


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, num_tasks=2)


@pytest.mark.L2
def test_a_job_saves_before_its_limit_and_goes_on_after_the_requeue(slurm: Slurm, tmp_path: Path) -> None:
    shards, run_dir = write_shards(tmp_path / "shards"), tmp_path / "run"
    config, *given = [x for x in arguments(shards, run_dir) if not x.startswith("system.run_dir=")]
    command = (str(run_dir), config, *given, *TRAINING)

    job = slurm.started(SCRIPT, *command, cwd=ROOT)
    try:
        wait_until(lambda: reported(run_dir) or job.poll() is not None, "the first report", slurm.log.read_text)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(WAIT_SECONDS) == 143, slurm.log.read_text()[-4000:]
    finally:
        job.kill()
        job.wait()
    saved_at = reported(run_dir)[-1]
    assert saved_at < STEPS
    assert slurm.requeued == [str(JOB_ID)]

    assert slurm.started(SCRIPT, *command, cwd=ROOT).wait(WAIT_SECONDS) == 0, slurm.log.read_text()
    assert slurm.requeued == [str(JOB_ID)], "a run that is done is not queued again"
    assert reported(run_dir) == list(range(2, STEPS + 1, 2))


def ending_with(code: int, here: Path) -> Path:
    """A directory in which engine/launch.py does nothing but end."""
    (here / "engine").mkdir(exist_ok=True)
    (here / "engine" / "launch.py").write_text(f"import os; os.kill(os.getpid(), 9) if {code} == 137 else exit({code})")
    return here


@pytest.mark.L0
@pytest.mark.parametrize(
    ("code", "is_requeued"),
    [(LOST_RANK, True), (137, True), (1, True), (FAILED, False), (MISTAKE, False), (STOPPED, False)],
)
def test_a_lost_rank_is_worth_another_start(slurm: Slurm, tmp_path: Path, code: int, is_requeued: bool) -> None:
    """143 without Slurm's signal: somebody stopped the run, and wants it stopped."""
    job = slurm.started(SCRIPT, "run", cwd=ending_with(code, tmp_path))
    assert job.wait(WAIT_SECONDS) == code, slurm.log.read_text()
    assert slurm.requeued == ([str(JOB_ID)] if is_requeued else [])


@pytest.mark.L0
def test_a_rank_lost_three_times_at_one_checkpoint_is_not_started_again(slurm: Slurm, tmp_path: Path) -> None:
    latest, counts = ending_with(LOST_RANK, tmp_path) / "run" / "checkpoints" / "latest", []
    for checkpoint in (None, None, None, "step-2", "step-4", "step-4", "step-4"):
        if checkpoint is not None:
            latest.parent.mkdir(parents=True, exist_ok=True)
            latest.write_text(checkpoint)
        assert slurm.started(SCRIPT, "run", cwd=tmp_path).wait(WAIT_SECONDS) == LOST_RANK
        counts.append(len(slurm.requeued))
    assert counts == [1, 2, 2, 3, 4, 5, 5]


@pytest.mark.L0
def test_a_task_is_a_rank_that_goes_on_where_it_can(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    show = (
        "import os, sys; print([os.environ[n] for n in {names}], os.environ['MASTER_ADDR'], sys.argv[1:], flush=True)"
    )
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    (tmp_path / "engine" / "launch.py").write_text(show.format(names=names))
    given = ["--config", "a b.yaml", "data.train=[x, y]"]
    assert slurm.started(SCRIPT, "run", *given, cwd=tmp_path).wait(WAIT_SECONDS) == 0
    received = [*given, "--resume", "auto", "system.run_dir=run"]
    expected = [f"{[str(rank), '0', '2', '24711']} localhost {received}" for rank in range(2)]
    assert sorted(slurm.log.read_text().splitlines()) == expected
