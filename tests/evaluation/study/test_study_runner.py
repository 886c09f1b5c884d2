"""Working through a study: order, resumption, failures, limits, and several processes on one directory."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from configs import UserError
from engine.run_directory import file_lock, lock_holder
from evaluation.study import results, runner
from evaluation.study.runner import WorkSession, error_lines, is_done, read_failure, read_record, run_cells
from tests.evaluation.study.made_up import NAMES, MadeUp, four_cells, made_up

pytestmark = pytest.mark.L0

CELLS = four_cells()
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 5.0)


def finish(layout: MadeUp, session: WorkSession | None = None) -> tuple[dict[str, list[str]], list[str]]:
    """The tally by list, and what was said."""
    said: list[str] = []
    tally = run_cells(layout, CELLS, session or WorkSession(), said.append)
    return {name: cells for name, cells in vars(tally).items() if cells}, said


def test_every_stage_runs_once_cheapest_budget_first(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    order = ["rec-0", "clip_rec-0", "rec-1", "clip_rec-1"]
    assert finish(layout)[0] == {"done": order}
    assert layout.ran() == ["shared-corpus", *(f"{cell}-{name}" for cell in order for name in NAMES)]
    assert finish(layout)[0] == {"done": order}
    assert len(layout.ran()) == 1 + 4 * len(NAMES)
    record = read_record(layout.cell(CELLS[0]), layout.stages(CELLS[0])[0])
    assert (record["is_done"], record["exit_code"]) == (True, 0)
    assert (layout.cell(CELLS[0]) / "logs" / "tokenizer.log").read_text().startswith("$ /bin/sh -c")


def test_a_result_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    finish(layout)
    layout.stages(CELLS[2])[3].result.unlink()
    finish(layout)
    assert layout.ran()[21:] == ["rec-1-generator"]


def test_changed_science_throws_away_what_depends_on_it(tmp_path: Path) -> None:
    finish(made_up(tmp_path))
    changed = made_up(tmp_path, science="another")
    (changed.cell(CELLS[0]) / "tokenizer" / "checkpoints").mkdir()
    (changed.cell(CELLS[0]) / "tokenizer" / "checkpoints" / "latest").write_text("of the old science")
    assert not is_done(changed.cell(CELLS[0]), changed.stages(CELLS[0])[0])
    finish(changed)
    assert changed.ran()[21:] == [f"{cell.name}-{name}" for cell in CELLS for name in NAMES]  # no --resume either
    assert not (changed.cell(CELLS[0]) / "tokenizer" / "checkpoints").exists()


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    sign = tmp_path / "break-rec-0-latents"
    sign.touch()
    tally, said = finish(layout)
    assert tally == {"done": ["clip_rec-0", "rec-1", "clip_rec-1"], "failed": ["rec-0"]}
    assert any("error: broken on purpose" in line and "latents.log" in line for line in said)
    found = read_failure(layout.cell(CELLS[0]))
    assert found is not None
    assert (found["stage"], found["last_words"]) == ("latents", "error: broken on purpose")
    assert results.cell_state(layout, CELLS[0]) == "failed"
    sign.unlink()
    assert finish(layout)[0]["done"] == [cell.name for cell in CELLS]
    assert layout.ran()[-3:] == ["rec-0-latents", "rec-0-generator", "rec-0-generation"]
    assert read_failure(layout.cell(CELLS[0])) is None


def test_a_failure_of_this_session_is_left_alone_by_those_that_were_there_before(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    (tmp_path / "break-rec-0-tokenizer").touch()
    finish(layout)
    later = time.time() + 60
    os.utime(layout.cell(CELLS[0]) / "failed.json", (later, later))  # as if another process had failed just now
    assert finish(layout)[0]["failed"] == ["rec-0"]
    assert layout.ran().count("rec-0-tokenizer") == 1


def test_without_what_all_share_nothing_starts(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    (tmp_path / "break-shared-corpus").touch()
    with pytest.raises(UserError, match="corpus failed, and every cell needs it: error: broken on purpose"):
        finish(layout)
    assert layout.ran() == ["shared-corpus"]


def test_a_training_cut_off_by_the_limit_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    (tmp_path / "hang-clip_rec-0-generator").touch()
    tally, _ = finish(layout, WorkSession(deadline=time.monotonic() + 1.5))
    assert tally == {"done": ["rec-0"], "stopped": ["clip_rec-0", "rec-1", "clip_rec-1"]}
    assert finish(layout)[0]["done"] == [cell.name for cell in CELLS]
    ran = layout.ran()
    assert ran.count("clip_rec-0-generator --resume") == 1
    assert ran.count("clip_rec-0-generator") == 1
    assert [line for line in ran if "--resume" in line] == ["clip_rec-0-generator --resume"]


def test_a_session_that_is_over_starts_nothing(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    tally, _ = finish(layout, WorkSession(deadline=time.monotonic() - 1))
    assert tally == {"stopped": [cell.name for cell in CELLS]}
    assert [cell for cell in CELLS if layout.cell(cell).exists()] == []


def test_a_cell_in_other_hands_is_passed_over(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    with file_lock(layout.lock("rec-1")) as lock:
        assert lock is not None
        tally, said = finish(layout)
    assert tally == {"done": ["rec-0", "clip_rec-0", "clip_rec-1"], "busy": ["rec-1"]}
    assert f"process {os.getpid()} of host" in next(line for line in said if line.startswith("rec-1"))
    assert finish(layout)[0]["done"] == [cell.name for cell in CELLS]


HOLDS = """
    import subprocess, sys, time
    from pathlib import Path
    from engine.run_directory import file_lock
    with file_lock(Path(sys.argv[1])) as lock:
        if sys.argv[2] == "child":
            child = subprocess.Popen(["/bin/sleep", "30"], pass_fds=[lock])
            print(child.pid, flush=True)
        else:
            print(0, flush=True)
        time.sleep(30)
"""


def test_the_lock_of_a_dead_process_is_free_but_not_while_its_command_lives(tmp_path: Path) -> None:
    for kind in ("alone", "child"):
        lock = tmp_path / kind
        command = [sys.executable, "-c", textwrap.dedent(HOLDS), str(lock), kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            with file_lock(lock) as mine:
                assert mine is None
            assert f"process {process.pid} of host" in lock_holder(lock)
            process.kill()
        if kind == "child":
            with file_lock(lock) as mine:
                assert mine is None, "what it started is still at work"
            os.kill(child, signal.SIGKILL)
            for _ in range(200):
                with file_lock(lock) as mine:
                    if mine is not None:
                        break
                time.sleep(0.01)
        with file_lock(lock) as mine:
            assert mine is not None


def test_what_a_stopped_command_started_ends_with_it(tmp_path: Path) -> None:
    stage = made_up(tmp_path).stages(CELLS[0])[1]
    pid_file = tmp_path / "pid"
    script = f"(trap 'sleep 0.3; exit' TERM; sleep 60 & wait) & echo $! > {pid_file}; wait"
    hanging = type(stage)("evaluation", ("/bin/sh", "-c", script), stage.result, stage.folder, "f")
    with file_lock(tmp_path / "lock") as lock:
        assert lock is not None
        assert runner.run_stage(hanging, tmp_path, lock, WorkSession(time.monotonic() + 0.3)) == "stopped"
    stat = Path(f"/proc/{int(pid_file.read_text())}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "its child is still at work"


def test_a_command_that_ends_well_without_its_result_has_failed(tmp_path: Path) -> None:
    stage = made_up(tmp_path).stages(CELLS[0])[1]
    empty = type(stage)("evaluation", ("/bin/sh", "-c", "true"), stage.result, stage.folder, "f")
    with file_lock(tmp_path / "lock") as lock:
        assert lock is not None
        assert runner.run_stage(empty, tmp_path, lock, WorkSession()) == "failed"


def test_the_words_of_a_failure_are_its_error_or_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\n  File x\ndata.shards.BadCaption: no\nKeyError: 'probe'\n\n[launcher] exits with 1\n")
    assert error_lines(log) == "KeyError: 'probe'"
    log.write_text("one\ntwo\nthree\nfour\n")
    assert error_lines(log) == "two | three | four"


def test_results_are_collected_with_what_is_missing(tmp_path: Path) -> None:
    layout = made_up(tmp_path)
    (tmp_path / "break-rec-0-generation").touch()
    finish(layout)
    found = results.collect_results(layout, CELLS)
    assert json.loads(json.dumps(found)) == found
    broken, whole = found["cells"][:2]
    assert broken["state"] == "failed"
    assert broken["failure"]["stage"] == "generation"
    assert "gfid" not in broken["figures"]
    assert broken["figures"]["rfid"] == 3.5
    assert whole["figures"] == {
        "probe": 0.3, "probe_features": 0.5, "rfid": 3.5, "psnr_db": 27.0, "network": "corpus:1, 64-d, 90 % acc",
        "images": 2000, "zero_shot": 0.2, "chance": 0.01, "gfid": 42.0, "samples": 2000, "gfid_guided": 31.0,
        "guidance": 2.0,
    }  # fmt: skip
    assert whole["seconds"].keys() == set(NAMES)
