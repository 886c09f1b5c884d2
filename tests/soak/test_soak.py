"""A soak of two faults: started by the real commands, disturbed, gone on with, compared."""

import os
from pathlib import Path

import pytest

from tests.engine.small_runs import write_shards
from tests.soak.checks import checks
from tests.soak.run import Run
from tests.soak.schedule import Fault
from tests.soak.story import compared

pytestmark = pytest.mark.L2

FAULTS = (Fault(2.0, "kill", 1, 0.5), Fault(1.0, "preempt", 0, 0.5))


def test_a_run_that_loses_a_rank_and_its_machines_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """kill -9, the watch, back-off and a start by the supervisor; then SIGTERM to it, a checkpoint, a start by us."""
    shards, mark = write_shards(tmp_path / "shards"), f"test-soak-{os.getpid()}"
    disturbed = Run(tmp_path / "disturbed", shards, ranks=2, mark=f"{mark}-d", seed=0)
    undisturbed = Run(tmp_path / "undisturbed", shards, 2, f"{mark}-u", seed=0, is_disturbed=False)
    said: list[str] = []
    story = compared(disturbed, undisturbed, FAULTS, 600.0, said.append)
    assert [str(check) for check in checks(disturbed, undisturbed, story, []) if not check.holds] == []
    assert [event.kind for event in story.events] == ["kill", "preempt"]
    assert disturbed.log.read_text().count("supervisor: exit code ") == 1
    assert disturbed.starts == 2
    assert len(said) == 3
