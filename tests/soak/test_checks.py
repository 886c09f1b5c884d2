"""The checks of a soak say that a rule is broken where it is: each is shown what it is there to find."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.directory import SUMS, checkpoint_name
from tests.soak.checks import Check, checks
from tests.soak.gauges import Life, Reading
from tests.soak.run import REPORT_EVERY, Run
from tests.soak.story import Event, Story

pytestmark = pytest.mark.L0

STEPS = (50, 100)
EVENT = Event(1.0, "kill", True, "SIGKILL to rank 1", step=70, good=50, resumed=50, seconds=9.0)
FLAT = [Life(7, "rank 0", [Reading(second, 600.0, 40, 20) for second in range(320)])]
NAMES = ["weights", "samples", "log", "window", "rank 0", "end"]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    """Two runs that have done the same."""
    return _written(tmp_path / "disturbed"), _written(tmp_path / "undisturbed")


def _written(folder: Path) -> Run:
    run = Run(folder, folder / "shards", ranks=1, mark=f"{folder}", seed=0)
    for step in STEPS:
        place = run.checkpoints / checkpoint_name(step)
        place.mkdir(parents=True)
        save_file({"weight": torch.full((4,), float(step))}, place / "rank-00000.safetensors")
        (place / "state.json").write_text(json.dumps({"samples_digest": f"{step:x}"}))
        (place / SUMS).touch()
    _write_log(run, range(REPORT_EVERY, STEPS[-1] + 1, REPORT_EVERY))
    return run


def _write_log(run: Run, steps: Sequence[int], loss: float = 1.0) -> None:
    reports = ({"step": step, "time": float(step), "loss/total": loss / step, "speed/mfu": 0.1} for step in steps)
    with (run.folder / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(report) + "\n" for report in reports)


def _broken(
    runs: tuple[Run, Run], events: Sequence[Event] = (EVENT,), code: int = 143, lives: list[Life] = FLAT, left: int = 0
) -> str:
    found: list[Check] = checks(*runs, Story(list(events), code, left), lives)
    assert [check.name for check in found] == NAMES
    return " ".join(check.name for check in found if not check.holds)


def test_what_is_the_same_breaks_no_rule(runs: tuple[Run, Run]) -> None:
    assert _broken(runs) == ""


def test_steps_that_were_done_again_alike_break_no_rule(runs: tuple[Run, Run]) -> None:
    _write_log(runs[0], range(70, 101, REPORT_EVERY))
    with (runs[0].folder / "log.jsonl").open("a") as log:
        log.write('{"step": 105, "ti')  # killed while it wrote
    assert _broken(runs) == ""


def test_one_bit_of_one_weight_is_found(runs: tuple[Run, Run]) -> None:
    weight = torch.full((4,), 50.0)
    weight[2] = torch.nextafter(weight[2], torch.tensor(99.0))
    save_file({"weight": weight}, runs[0].checkpoints / checkpoint_name(50) / "rank-00000.safetensors")
    assert _broken(runs) == "weights"


def test_a_missing_tensor_is_found(runs: tuple[Run, Run]) -> None:
    save_file({}, runs[0].checkpoints / checkpoint_name(50) / "rank-00000.safetensors")
    assert _broken(runs) == "weights"


def test_runs_without_a_common_checkpoint_show_nothing(runs: tuple[Run, Run]) -> None:
    for step in STEPS:
        (runs[0].checkpoints / checkpoint_name(step) / SUMS).unlink()
    assert _broken(runs) == "weights samples"


def test_other_samples_are_found(runs: tuple[Run, Run]) -> None:
    (runs[0].checkpoints / checkpoint_name(100) / "state.json").write_text('{"samples_digest": "0"}')
    assert _broken(runs) == "samples"


def test_a_report_that_is_missing_is_found(runs: tuple[Run, Run]) -> None:
    (runs[0].folder / "log.jsonl").unlink()
    _write_log(runs[0], range(2 * REPORT_EVERY, STEPS[-1] + 1, REPORT_EVERY))
    assert _broken(runs) == "log"


def test_another_loss_is_found(runs: tuple[Run, Run]) -> None:
    _write_log(runs[0], [60], loss=1 + 1e-15)
    assert _broken(runs) == "log"


def test_going_back_behind_the_newest_good_checkpoint_is_found(runs: tuple[Run, Run]) -> None:
    assert _broken(runs, [EVENT, replace(EVENT, resumed=25)]) == "window"


@pytest.mark.parametrize(
    "late", [{"rss_mib": 700.0}, {"num_files": 41}, {"num_threads": 21}], ids=["memory", "files", "threads"]
)
def test_what_grows_is_found(runs: tuple[Run, Run], late: dict[str, int]) -> None:
    grown = [reading._replace(**late) if reading.seconds > 250 else reading for reading in FLAT[0].readings]
    assert _broken(runs, lives=[Life(7, "rank 0", grown)]) == "rank 0"


def test_a_process_that_lived_shortly_says_nothing(runs: tuple[Run, Run]) -> None:
    short = Life(8, "rank 1", [Reading(second, 600.0 + second, second, 20) for second in range(220)])
    assert _broken(runs, lives=[*FLAT, short]) == ""


def test_another_exit_code_a_draft_and_a_process_that_is_left_are_found(runs: tuple[Run, Run]) -> None:
    assert _broken(runs, code=1) == "end"
    (runs[0].checkpoints / ".step-00000110.tmp").mkdir()
    assert _broken(runs) == "end"
    (runs[0].checkpoints / ".step-00000110.tmp").rmdir()
    assert _broken(runs, left=1) == "end"
