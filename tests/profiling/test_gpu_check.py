"""The GPU check goes on whatever a step does, and says of each what came of it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from profiling.bench import BENCHES
from profiling.gpu_check import __main__ as gpu_check
from profiling.gpu_check.page import page
from profiling.gpu_check.runner import read_outcomes, run_step, unpack_caches
from profiling.gpu_check.steps import OUT, PYTEST, RUN_SECONDS, STEPS, CheckStep, steps_of

pytestmark = pytest.mark.L0
ROOT = Path(__file__).resolve().parents[2]

MEASURED = [
    {
        "name": "train", "workload": "vtp_l: 64 clip", "reference": "engine", "machine": {"device": "H100"},
        "rows": [{"variant": "engine", "median_ms": 136.0, "spread": 0.01, "speedup": 1.0, "peak_mib": 61_000.5,
                  "mfu": 0.471, "rounds": 10, "warm_up_s": 41.0}],
        "notes": ["470.1 samples/s"],
    },
    {"name": "fp8_losses", "workload": "vtp_l, 200 steps", "machine": {"device": "H100"},
     "losses": {"bf16": [9.0, 8.0], "fp8_torchao": [9.0, 8.1]}, "notes": []},
]  # fmt: skip


def python(name: str, code: str, **others: object) -> CheckStep:
    return CheckStep(name, f"does it {name}?", ("-c", code), seconds=60, dry=60, needs=(), **others)  # type: ignore[arg-type]


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
        python("need", "", optional=("no_such_module",)),
        CheckStep("lack", "is it there?", ("-c", ""), 60, 60, needs=("no.such.module",)),
        python("work", write, optional=("json", "nor_this_one")),
    )
    monkeypatch.setattr(gpu_check, "steps_of", lambda run: list(found))


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
    assert summary["packages"]["torch"] == version("torch")
    for words in (
        "on NVIDIA H100",
        "crash: failed",
        "- 470.1 samples/s",
        "exit code -6",
        "not installed: no.such.module",
        "nor_this_one",
    ):
        assert words in said
    written = (tmp_path / "out" / "page.md").read_text()
    for words in ("# On NVIDIA H100", "illegal access", "| engine | 136.00 | 10 | 1% | 1.00 | 61,000 | 47.1% | 41.0 |",
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
    record = run_step(python("hang", code), tmp_path, limit_seconds=10)
    assert (record["state"], record["why"]) == ("late", "took longer than 10 s")
    assert is_gone(int(record["last_lines"][0]))


def test_ended_from_outside_it_leaves_no_step_behind(tmp_path: Path) -> None:
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        "from profiling.gpu_check import __main__ as m, steps; import sys; "
        f"m.steps_of = lambda run: [steps.CheckStep('hang', '?', ('-c', {hangs!r}), 600, 600, needs=())]; "
        f"sys.exit(m.main(['--out', {str(tmp_path)!r}]))"
    )
    check = subprocess.Popen([sys.executable, "-c", code])
    log, until = tmp_path / "hang.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    check.terminate()
    assert check.wait(30) == 143
    assert is_gone(int(log.read_text()))


TESTS = """
import os, signal
import pytest

@pytest.mark.gpu
def test_good(): pass

@pytest.mark.gpu
def test_bad(): assert 1 + 1 == 3, "no sum"

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_left(): pass

@pytest.mark.gpu
def test_deadly(): os.kill(os.getpid(), signal.SIGKILL)
"""


def pytest_of(folder: Path, name: str, *chosen: str) -> CheckStep:
    """A step of tests in a folder of its own, far from this house's settings."""
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    words = (*PYTEST, "--outcomes", f"{OUT}/{name}.tests", "--rootdir", str(folder), "-c", str(folder / "pytest.ini"))
    return CheckStep(name, "?", (*words, str(folder / "test_it.py"), *chosen), 60, 60, needs=())


def test_a_record_of_tests_says_which_passed_failed_and_were_skipped(tmp_path: Path) -> None:
    record = run_step(pytest_of(tmp_path, "tests", "-k", "not deadly"), tmp_path, limit_seconds=60)
    assert (record["state"], record["tests"]) == ("failed", {"passed": 1, "failed": 1, "skipped": 1})
    assert list(record["passed_tests"]) == ["test_it.py::test_good"]
    assert "no sum" in record["failed_tests"]["test_it.py::test_bad"]
    assert record["skipped_tests"] == {"test_it.py::test_left": "needs a CUDA device"}
    written = page({"gpu": None, "packages": {}, "records": [record]}, tmp_path)
    assert "- failed: `test_it.py::test_bad`: " in written
    assert "- passed: `test_it.py::test_good`" in written


def test_tests_that_are_ended_leave_what_they_had_shown(tmp_path: Path) -> None:
    record = run_step(pytest_of(tmp_path, "tests", "-k", "good or deadly"), tmp_path, limit_seconds=60)
    assert record["why"] == "exit code -9 in test_it.py::test_deadly"
    assert list(record["passed_tests"]) == ["test_it.py::test_good"]
    assert "test_good PASSED" in (tmp_path / "tests.log").read_text()


def test_a_line_cut_short_and_a_failure_after_the_test_are_read_right(tmp_path: Path) -> None:
    lines = [
        {"test": "a", "outcome": "passed", "seconds": 1, "why": ""},
        {"test": "a", "outcome": "failed", "seconds": 1, "why": "at its end"},
        {"test": "b", "outcome": "running", "seconds": 0, "why": ""},
    ]
    (tmp_path / "x.tests").write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "c", "outc')
    found = read_outcomes(tmp_path / "x.tests")
    assert (found["failed_tests"], found["running"]) == ({"a": "at its end"}, "b")
    assert read_outcomes(tmp_path / "none") == {}


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--only", "trian"]) == 2
    assert capsys.readouterr().err.startswith("error: --only trian: the steps are doctor, kernels, train")
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0"]) == 2
    assert "--minutes 0: give a number above 0" in capsys.readouterr().err


def test_the_steps_are_benches_that_exist_and_fit_in_their_order() -> None:
    asked = [step.command[2] for step in STEPS if step.command[1] == "profiling.bench"]
    assert set(asked) <= set(BENCHES)
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert [step.run for step in STEPS] == sorted(step.run for step in STEPS)
    of_train = next(step for step in STEPS if step.name == "train")
    assert of_train.command_line("out", is_dry=False)[2:] == ["train", "--rounds=10", "--json", "out/train.json"]
    assert of_train.command_line("out", is_dry=True)[3] == "--dry"
    for run in (1, 2):
        assert sum(step.seconds for step in steps_of(run)) <= RUN_SECONDS


def test_every_test_marked_gpu_belongs_to_a_step() -> None:
    asked = {word.partition("::")[0] for step in STEPS for word in step.command if word.startswith("tests/")}
    marked = {
        str(path.relative_to(ROOT))
        for path in {*(ROOT / "tests").rglob("test_*.py")} - {Path(__file__)}
        if re.search(r"^(@pytest\.mark\.gpu$|    pytest\.mark\.gpu,$)", path.read_text(), re.MULTILINE)
    }
    assert asked == marked


def test_what_a_step_does_not_use_the_steps_after_it_may() -> None:
    first, second = (CheckStep(name, "?", (), seconds, 0, needs=()) for name, seconds in (("a", 60.0), ("b", 30.0)))
    assert gpu_check._limit([first, second], 90) == 60
    assert gpu_check._limit([first, second], 70) == 60, "the order is that of worth: the last ones give way"
    assert gpu_check._limit([second], 75) == 75


def test_a_run_takes_its_steps_and_their_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, float] = {}

    def recorded(step: CheckStep, out: Path, limit: float, *others: object) -> dict[str, Any]:
        limits[step.name] = limit
        return {"step": step.name, "question": "?", "state": "done"}

    monkeypatch.setattr(gpu_check, "_gpu", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_check, "run_step", recorded)
    assert gpu_check.main(["--out", str(tmp_path), "--run", "1"]) == 0
    assert list(limits) == [step.name for step in steps_of(1)]
    assert limits["doctor"] == pytest.approx(30, abs=1)
    assert limits["attention"] == pytest.approx(sum(step.seconds for step in steps_of(1)), abs=1), "nothing was used"


def test_while_a_step_runs_the_summary_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = f"import pathlib; print(pathlib.Path('{OUT}/summary.json').read_text())"
    monkeypatch.setattr(gpu_check, "steps_of", lambda run: [python("look", look)])
    monkeypatch.setattr(gpu_check, "_gpu", lambda: None)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    seen = json.loads((tmp_path / "look.log").read_text())["records"]
    assert [(record["step"], record["state"]) for record in seen] == [("look", "running")]


def test_compilers_find_again_what_they_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another folder of temporary files, as on another machine."""
    code = (
        "import os, pathlib; file = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / 'kernel'; print(file.is_file()); "
        "file.parent.mkdir(exist_ok=True); file.write_text('made'); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    monkeypatch.setattr(gpu_check, "steps_of", lambda run: [python("make", code)])
    monkeypatch.setattr(gpu_check, "_gpu", lambda: None)
    for number, was_there in enumerate(("False", "True")):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / str(number)))
        (tmp_path / str(number)).mkdir()
        out = tmp_path / f"out{number}"
        assert gpu_check.main(["--out", str(out), "--caches", str(tmp_path / "kept" / "caches.tar.gz")]) == 0
        found, inductor = (out / "make.log").read_text().split()
        assert found == was_there
        assert Path(inductor).parent.parent == tmp_path / str(number)


WITHOUT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Without:
    plain = PathFinder.find_spec
    def __call__(self, name, path=None, target=None):
        return None if name in {absent} else self.plain(name, path, target)

PathFinder.find_spec = Without()
import pytest
words = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
assert pytest.main([*words, *{files}]) == 0
for package in {packages}:
    for module in pkgutil.walk_packages([package], package + "."):
        importlib.import_module(module.name)
"""
ABSENT = {
    "nvidia.dali",
    "transformer_engine",
    "flash_attn",
    "xformers",
    "webdataset",
    "hypothesis",
    "skimage",
    "sklearn",
}


@pytest.mark.L1
def test_without_dali_and_others_all_modules_import_and_tests_of_a_gpu_are_collected() -> None:
    files = sorted({word for step in STEPS for word in step.command if word.startswith("tests/")})
    packages = ("configs", "kernels", "data", "model", "profiling", "engine", "evaluation")
    code = WITHOUT.format(absent=ABSENT | {"torchao"}, packages=packages, files=files)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for collected in ("test_varlen.py::", "test_transparency.py::", "test_gpu.py::", "test_doctor.py::"):
        assert collected in done.stdout
    assert "SKIPPED [1] tests/kernels/test_contrastive_kernel.py:1: not installed: hypothesis" in done.stdout


def test_packed_caches_are_written_below_their_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with tarfile.open(tmp_path / "caches.tar.gz", "w:gz") as tar:
        for name in ("./inductor/kernel.so", "../outside", f"{tmp_path}/absolute"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"made"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    folder = unpack_caches(tmp_path / "caches.tar.gz")
    written = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert set(written) == {tmp_path / "caches.tar.gz", folder / "inductor/kernel.so"}
    assert (folder / "inductor/kernel.so").read_bytes() == b"made"


def test_it_imports_nothing_but_the_standard_library() -> None:
    asked = "sorted({'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules))"
    code = f"import sys, profiling.gpu_check.__main__; print({asked})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
