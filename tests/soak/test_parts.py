"""The parts of a soak: its schedule, its gauges, what it does to processes and files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from configs import UserError
from engine.checkpoint import directory
from tests.soak import faults
from tests.soak.gauges import Reading, slope
from tests.soak.processes import MARK, end_all, marked, role_of, use_of
from tests.soak.schedule import FAULTS, Fault, schedule

pytestmark = pytest.mark.L0

OWN = f"test-{os.getpid()}"
WAITS = "import sys; print('there', flush=True); sys.stdin.read()"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A marked process that does nothing, named as a launcher names rank 1."""
    started = subprocess.Popen(
        [sys.executable, "-c", WAITS, "--local_rank=1"], env=os.environ | {MARK: OWN}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "there\n"
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@dataclass
class Target:
    """What faults have to know of a run."""

    checkpoints: Path
    mark: str = "nobody's"
    silent_seconds: float = 1.0

    def ask_to_stop(self) -> None:
        raise AssertionError("nothing here asks to stop")


def test_a_seed_gives_the_same_faults_each_time_and_another_seed_others() -> None:
    first, again, other = (list(islice(schedule(seed, 3), 24)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", range(5))
def test_eight_faults_are_of_all_kinds_and_hit_ranks_that_are_there(seed: int) -> None:
    drawn = list(islice(schedule(seed, 3, mean_seconds=10), 16))
    for part in (drawn[:8], drawn[8:]):
        assert {fault.kind for fault in part} == set(FAULTS)
    assert {fault.rank for fault in drawn} <= {0, 1, 2}
    assert all(4 <= fault.after_seconds <= 16 for fault in drawn)


def test_a_slope_is_that_of_most_readings() -> None:
    rising = [Reading(second, 500 + 0.1 * second, 40, 20) for second in range(600)]
    for second in (17, 300, 301, 599):
        rising[second] = rising[second]._replace(rss_mib=3000.0)
    assert slope(rising) == pytest.approx(6.0)
    assert slope([Reading(second, 512.0, 40, 20) for second in range(50)]) == 0
    assert slope(rising[:1]) == 0


def test_marked_processes_are_found_measured_and_ended(process: subprocess.Popen[str]) -> None:
    assert marked(OWN) == [process.pid]
    assert role_of(process.pid) == "rank 1"
    use = use_of(process.pid)
    assert 1 < use.rss_mib < 1000
    assert use.num_files >= 3
    assert use.num_threads == 1
    end_all(OWN)
    assert process.wait(10) == -9
    assert marked(OWN) == []


def test_a_shard_that_is_open_counts_from_its_second_handle_on(tmp_path: Path) -> None:
    """That a rank comes to a shard at last is no leak; that it opens one again and again would be."""
    before = use_of(os.getpid()).num_files
    with ExitStack() as files:
        for name, more in (("00000.tar", 0), ("00001.tar", 0), ("00000.tar", 1), ("notes.txt", 2)):
            files.enter_context((tmp_path / name).open("w"))
            assert use_of(os.getpid()).num_files - before == more


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_spoiled_checkpoint_is_one_that_is_refused(tmp_path: Path, strength: float) -> None:
    for step in (10, 20):
        draft = directory.draft_path(tmp_path, step)
        draft.mkdir()
        for name in ("rank-00000.safetensors", "state.json"):
            (draft / name).write_bytes(os.urandom(100))
        directory.commit_draft(draft, [directory.checksum_line(path) for path in sorted(draft.iterdir())])
    older, newer = directory.complete_checkpoints(tmp_path)
    words = faults.do(Fault(0.0, "spoil", 0, strength), Target(tmp_path))
    assert words.startswith("step-00000020/")
    directory.check_checksums(older)
    if newer in directory.complete_checkpoints(tmp_path):  # without its list of sums it is none any more
        with pytest.raises(UserError, match="damaged"):
            directory.check_checksums(newer)


def test_every_fault_has_its_way() -> None:
    assert faults.WAYS.keys() == FAULTS.keys()
