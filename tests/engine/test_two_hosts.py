"""A run over two hosts, as `deepspeed --hostfile` starts it, and what becomes of it when it is disturbed.

The hosts are namespaces of this machine with a cable between them (tests/engine/hosts.py); runner, launcher and ranks
are the real ones. One run is told, in order: its supervisor is asked to stop, it goes on, a host crashes, it goes on,
supervised, the cable is cut and mended, and it ends with the weights of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.hosts import ADDRESSES, NAMES, Hosts, two_hosts, why_not
from tests.engine.small_runs import (
    LAUNCH,
    ROOT,
    WAIT_SECONDS,
    arguments,
    differing_weights,
    launch_here,
    reported,
    wait_until,
    write_shards,
)
from tests.harness import run_ranks

pytestmark = [pytest.mark.L2, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

STEPS = 48
TRAINING = (f"optim.steps={STEPS}", "optim.warmup=0.0", "system.checkpoint.every=6", "system.watch.silent_seconds=10")
# docs/clusters/ssh.md: what the launcher does not send by itself.
DEEPSPEED_ENV = "DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n"
RANK = "[e]ngine/launch.py --local_rank"  # a pattern that does not match the command it stands in
BY_HAND = (str(Path(sys.executable).parent / "deepspeed"), "--hostfile", "hosts", str(LAUNCH))
SUPERVISED = (str(LAUNCH), "--max-restarts", "2", "--launcher", "deepspeed --hostfile hosts")


@dataclass(frozen=True)
class Ended:
    """How a launch ended, and what its ranks were given, by host."""

    exit_code: int
    said: str
    environments: dict[str, dict[str, str]]
    last_step: int


@dataclass
class Place:
    """The hosts, and a directory that both see, as shared storage."""

    hosts: Hosts
    here: Path
    shards: Path

    @property
    def run_dir(self) -> Path:
        return self.here / "run"

    @property
    def log(self) -> Path:
        """What the last launch printed."""
        return self.here / "launcher.log"

    @contextmanager
    def launched(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """One of the commands of docs/clusters/ssh.md, running."""
        path = f"{self.hosts.bin}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.here), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        environment |= {"NCCL_DEBUG": "WARN", "NOT_NAMED": "1"}
        whole = [sys.executable, *command, *arguments(self.shards, self.run_dir), *TRAINING, "--resume", "auto"]
        with self.log.open("wb") as log:
            process = subprocess.Popen(whole, cwd=self.here, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes]) -> None:
        def arrived() -> bool:
            assert process.poll() is None, self.log.read_text()[-4000:]
            return max(reported(self.run_dir), default=0) >= step

        wait_until(arrived, f"step {step}", self.log.read_text)

    def ended(self, process: subprocess.Popen[bytes], environments: dict[str, dict[str, str]] | None = None) -> Ended:
        """Waits for the launcher to end by itself."""
        code = process.wait(WAIT_SECONDS)
        return Ended(code, self.log.read_text(), environments or {}, reported(self.run_dir)[-1])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Place]:
    here = tmp_path_factory.mktemp("cluster")
    (here / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (here / ".deepspeed_env").write_text(DEEPSPEED_ENV)
    with two_hosts(here / "reached") as hosts:
        yield Place(hosts, here, shards)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The same run from its first step to its last, on two ranks of this machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_ranks(launch_here, 2, [*arguments(shards, run_dir), *TRAINING], join=False) == [0, 0]
    return run_dir


@pytest.fixture(scope="module")
def stopped(place: Place) -> Ended:
    """Its supervisor was asked to stop, on a host where no rank is."""
    with place.launched(*SUPERVISED) as process:
        place.wait_for_step(4, process)
        environments = {name: environment_of_rank(place.hosts, name) for name in NAMES}
        process.send_signal(signal.SIGTERM)
        return place.ended(process, environments)


@pytest.fixture(scope="module")
def crashed(place: Place, stopped: Ended) -> Ended:
    """It went on, until the second host lost its power; then the host came back."""
    with place.launched(*BY_HAND) as process:
        place.wait_for_step(stopped.last_step + 8, process)
        place.hosts.crash(NAMES[1])
        ended = place.ended(process)
    place.hosts.start(NAMES[1])
    return ended


@pytest.fixture(scope="module")
def cut_off(place: Place, crashed: Ended) -> Ended:
    """It went on, supervised, until the cable was cut; the cable was mended, and it went on by itself to its end."""
    with place.launched(*SUPERVISED) as process:
        place.wait_for_step(crashed.last_step + 2, process)
        place.hosts.link("down")
        wait_until(lambda: "supervisor: " in place.log.read_text(), "the launcher's end", place.log.read_text)
        place.hosts.link("up")
        return place.ended(process)


def environment_of_rank(hosts: Hosts, name: str) -> dict[str, str]:
    """The variables with which the rank on that host was started."""
    told = hosts.run(name, f"cat /proc/$(pgrep -f '{RANK}')/environ")
    return dict(entry.split("=", 1) for entry in told.split("\0") if entry)


def lost(ended: Ended, name: str) -> list[str]:
    """What the rank on that host said of the rank that it misses, its host."""
    line = rf"^{name}: error: rank \d ends, a rank is lost: (\w+: rank \d \(host [\w-]+\))"
    return re.findall(line, ended.said, re.MULTILINE)


def test_a_run_over_two_hosts_stops_when_its_supervisor_is_asked(place: Place, stopped: Ended) -> None:
    assert stopped.exit_code == 143, stopped.said[-4000:]
    assert "supervisor: " not in stopped.said, "the ranks ended by themselves, with 143"
    assert not (place.run_dir / "stop").exists()
    assert f"Using IP address of {ADDRESSES[NAMES[0]]}" in stopped.said
    assert stopped.last_step < STEPS
    assert f"saved {place.run_dir}/checkpoints/step-{stopped.last_step:08d}" in stopped.said


def test_ranks_are_given_what_deepspeed_sends_and_what_its_file_names(stopped: Ended) -> None:
    for number, name in enumerate(NAMES):
        given = stopped.environments[name]
        from_deepspeed = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[NAMES[0]]}
        from_file = dict(line.split("=") for line in DEEPSPEED_ENV.split())
        assert given | from_deepspeed | from_file == given
        assert str(ROOT) in given["PYTHONPATH"].split(":"), "DeepSpeed sends what starts with PYTHON"
        assert not {"NCCL_DEBUG", "NOT_NAMED"} & given.keys(), "a machine without a GPU sends no NCCL_*, see ssh.md"


def test_a_crashed_host_ends_the_run_on_the_other(crashed: Ended) -> None:
    """Its own launch ends with the signal's code, the other with 75; pdsh gives the larger of both."""
    assert crashed.exit_code not in (0, 143), crashed.said[-4000:]
    assert lost(crashed, NAMES[0]) == [f"dead: rank 1 (host {NAMES[1]})"], crashed.said[-4000:]


def test_a_cut_cable_ends_the_ranks_on_both_sides_of_it(place: Place, crashed: Ended, cut_off: Ended) -> None:
    """No process has ended and no connection is closed: each side has only the other's silence to go by."""
    assert lost(cut_off, NAMES[0]) == [f"silent: rank 1 (host {NAMES[1]})"], cut_off.said[-4000:]
    assert lost(cut_off, NAMES[1]) == [f"silent: rank 0 (host {NAMES[0]})"], cut_off.said[-4000:]
    told = [json.loads(line) for line in (place.run_dir / "failures.jsonl").read_text().splitlines()]
    [failure] = [failure for failure in told if failure["kind"] == "silent" and failure["rank"] == 1]
    assert failure["host"] == NAMES[1]
    assert failure["step"] > 0
    assert failure["phase"]


def test_a_supervised_run_goes_on_by_itself_to_the_weights_of_an_undisturbed_one(
    place: Place, cut_off: Ended, undisturbed: Path
) -> None:
    assert cut_off.exit_code == 0, cut_off.said[-4000:]
    assert cut_off.said.count("supervisor: exit code 75 after the checkpoint of step") == 1
    assert sorted(set(reported(place.run_dir))) == list(range(2, STEPS + 1, 2)), "those after a checkpoint twice"
    assert differing_weights(place.run_dir, undisturbed) == []
