"""The GPU check goes on whatever a step does, and says of each what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiling.bench import BENCHES
from profiling.gpu_check import __main__ as gpu_check
from profiling.gpu_check.carry_out import carry_out
from profiling.gpu_check.page import page
from profiling.gpu_check.steps import OUT, STEPS, Step

pytestmark = pytest.mark.L0

MEASURED = [
    {
        "name": "train", "workload": "vtp_l: 64 clip", "reference": "engine", "machine": {"device": "H100"},
        "rows": [{"variant": "engine", "median_ms": 136.0, "spread": 0.01, "speedup": 1.0, "peak_mib": 61_000.5,
                  "mfu": 0.471}],
        "notes": ["470.1 samples/s"],
    },
    {"name": "fp8_losses", "workload": "vtp_l, 200 steps", "machine": {"device": "H100"},
     "losses": {"bf16": [9.0, 8.0], "fp8_torchao": [9.0, 8.1]}, "notes": []},
]  # fmt: skip
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="wrong">Traceback</failure></testcase>
<testcase classname="tests.a" name="left"><skipped message="needs a CUDA device"/></testcase>
<testcase classname="" name="tests.data.test_decode"><error>
E   ModuleNotFoundError: No module named 'nvidia'</error></testcase>
</testsuite></testsuites>"""


def python(name: str, code: str, **others: object) -> Step:
    return Step(name, f"does it {name}?", ("-c", code), seconds=60, dry=60, needs=(), **others)  # type: ignore[arg-type]


def is_gone(pid: int) -> bool:
    """Within ten seconds: a process that was killed takes a moment to die."""
    status, until = Path(f"/proc/{pid}/status"), time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if "State:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    write = f"import json, pathlib; pathlib.Path('{OUT}/work.json').write_text(json.dumps({MEASURED!r}))"
    found = (
        python("crash", "import os; print('illegal access', flush=True); os.abort()"),
        python("need", "", extra=("no_such_module",)),
        Step("lack", "is it there?", ("-c", ""), 60, 60, needs=("no.such.module",)),
        python("work", write, extra=("json", "nor_this_one")),
    )
    monkeypatch.setattr(gpu_check, "STEPS", found)


def test_the_rest_is_done_whatever_a_step_does(
    steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_gpu", lambda: "NVIDIA H100 80GB HBM3, driver_version 580.1")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["gpu"].startswith("NVIDIA H100")
    assert {record["step"]: record["state"] for record in summary["records"]} == {
        "crash": "failed", "need": "done", "lack": "left out", "work": "done",
    }  # fmt: skip
    said = capsys.readouterr().out
    for words in ("on NVIDIA H100", "crash: failed", "exit code -6", "not installed: no.such.module", "nor_this_one"):
        assert words in said
    written = (tmp_path / "out" / "page.md").read_text()
    for words in ("# On NVIDIA H100", "illegal access", "| engine | 136.00 | 1% | 1.00 | 61,000 | 47.1% |",
                  "- 470.1 samples/s", "| 1 | 8.0000 | 8.1000 |"):  # fmt: skip
        assert words in written


def test_without_a_gpu_nobody_takes_it_for_one(
    steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_gpu", lambda: None)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "work"]) == 0
    assert "dry run on the CPU" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text().startswith("# Dry run on a CPU: nothing here is a figure of a GPU")


def test_what_there_is_no_time_for_is_left_out(steps: None, tmp_path: Path) -> None:
    (tmp_path / "work.json").write_text(json.dumps(MEASURED))  # of an earlier check
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0.01"]) == 0
    [why] = {record["why"] for record in json.loads((tmp_path / "summary.json").read_text())["records"]}
    assert why == "no time was left"
    assert "470.1 samples/s" not in (tmp_path / "page.md").read_text()


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); {child}"
    )
    record = carry_out(python("hang", code), tmp_path, limit_seconds=10)
    assert (record["state"], record["why"]) == ("late", "took longer than 10 s")
    assert is_gone(int(record["last_lines"][0]))


def test_ended_from_outside_it_leaves_no_step_behind(tmp_path: Path) -> None:
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        "from profiling.gpu_check import __main__ as m, steps; import sys; "
        f"m.STEPS = (steps.Step('hang', '?', ('-c', {hangs!r}), 600, 600, needs=()),); "
        f"sys.exit(m.main(['--out', {str(tmp_path)!r}]))"
    )
    check = subprocess.Popen([sys.executable, "-c", code])
    log, until = tmp_path / "hang.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    check.terminate()
    assert check.wait(30) == 143
    assert is_gone(int(log.read_text()))


def test_tests_are_told_apart(tmp_path: Path) -> None:
    report = f"import pathlib, sys; pathlib.Path('{OUT}/tests.xml').write_text({REPORT!r}); sys.exit(1)"
    record = carry_out(python("tests", report), tmp_path, limit_seconds=60)
    assert record["tests"] == {"passed": 1, "failed": 1, "skipped": 2}
    assert (record["state"], record["failed_tests"]) == ("failed", ["tests.a.bad"])
    assert "No module named 'nvidia'" in record["skipped_tests"][".tests.data.test_decode"]
    assert "- failed: `tests.a.bad`" in page({"gpu": None, "records": [record]}, tmp_path)
    good = REPORT.replace('<failure message="wrong">Traceback</failure>', "")
    report = f"import pathlib, sys; pathlib.Path('{OUT}/tests.xml').write_text({good!r}); sys.exit(1)"
    assert carry_out(python("tests", report), tmp_path, limit_seconds=60)["state"] == "done"


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--only", "trian"]) == 2
    assert capsys.readouterr().err.startswith("error: --only trian: the steps are doctor, tests, train")
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0"]) == 2
    assert "--minutes 0: give a number above 0" in capsys.readouterr().err


def test_the_steps_are_benches_that_exist_and_fit_in_their_order() -> None:
    asked = [step.command[2] for step in STEPS if step.command[1] == "profiling.bench"]
    assert set(asked) <= set(BENCHES)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_it_imports_nothing_but_the_standard_library() -> None:
    asked = "sorted({'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules))"
    code = f"import sys, profiling.gpu_check.__main__; print({asked})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
