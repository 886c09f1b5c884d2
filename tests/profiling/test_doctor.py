"""The doctor finds what is there, says what is not and how to get it, and no broken package stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import load_config
from engine import optim
from kernels import fp8
from kernels.attention import DENSE_KERNELS, REQUIREMENTS, AttentionBackend
from profiling.doctor import __main__, checks, packages
from profiling.doctor.checks import PART_OF_TORCH
from profiling.doctor.packages import PACKAGES, CheckResult, ImportResult, run_check, try_imports

pytestmark = pytest.mark.L0
ROOT = Path(__file__).resolve().parents[2]


def run_doctor(*arguments: str, before_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(before_path or ""), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "profiling.doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    found = [finding for group in report["groups"].values() for finding in group]
    assert len({finding["name"] for finding in found}) == len(found), "two findings of one name"
    return {finding["name"]: finding for finding in found}


def fake_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def test_a_run_is_possible_here_and_a_broken_package_is_told(tmp_path: Path) -> None:
    """One call for both: the doctor takes seconds, most of them imports."""
    fake_package(tmp_path, "flash_attn_interface", "raise OSError('undefined symbol: _ZN3c104cuda')")
    done = run_doctor("--quick", "--json", before_path=tmp_path)
    assert done.returncode == 0, done.stderr
    report, found = json.loads(done.stdout), findings(done)
    assert report["is_possible"]
    assert report["missing"] == []

    assert {f"attention {name}" for name in (*DENSE_KERNELS, *REQUIREMENTS, "in this run")} <= found.keys()
    assert {package.distribution for package in PACKAGES} <= found.keys()
    assert {"linear fp8_te", "optimizer apex", "compile in this run", "decoding gpu", "energy"} <= found.keys()
    assert found["torch"]["said"].startswith(torch.__version__)
    assert found["decoding cpu"]["said"].endswith("48 x 32 pixels came out")
    assert all(one["remedy"] for one in found.values() if one["state"] != "ok")

    for name in ("flash-attn-3", "attention flash3"):
        assert found[name]["state"] == "broken"
        assert found[name]["said"].startswith("OSError: undefined symbol: _ZN3c104cuda")
    if not torch.cuda.is_available():
        assert report["device"] == "CPU"
        assert found["GPU"]["state"] == "absent"
        assert found["attention varlen"]["state"] == "absent"
        assert found["attention varlen"]["remedy"] == "use a machine with an NVIDIA GPU: Ampere or newer"
        assert found["attention in this run"]["said"].startswith("matmul (auto: bf16 on CPU")


def test_without_torch_the_doctor_still_speaks_and_says_that_no_run_is_possible(tmp_path: Path) -> None:
    fake_package(tmp_path, "torch", "raise RuntimeError('built for another processor')")
    done = run_doctor("--quick", "--json", before_path=tmp_path)
    assert done.returncode == 1, done.stderr
    found = findings(done)
    assert found["torch"]["state"] == "broken"
    assert found["torch"]["said"].startswith("RuntimeError: built for another processor")
    assert "torch" in json.loads(done.stdout)["missing"]
    assert found["tokenizers"]["state"] == "ok", "what needs no torch is still told"
    assert found["disk"]["said"]
    assert found["CPU"]["said"] == "not checked: torch cannot be imported"


def test_a_package_that_takes_its_process_along_is_broken_and_the_next_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, "crashing", "import os; print('loading', flush=True); os.abort()")
    fake_package(tmp_path, "leaving", "raise SystemExit('no licence')")
    fake_package(tmp_path, "sound", "__version__ = '1.2'; print('welcome')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = try_imports(["crashing", "leaving", "no_such_package", "sound"])
    assert answers["crashing"].state == "broken"
    assert answers["crashing"].detail == "importing it ended the process (exit code -6): loading"
    assert answers["leaving"] == ImportResult("broken", "SystemExit: no licence")
    assert answers["no_such_package"] == ImportResult("absent", "not installed")
    assert answers["sound"] == ImportResult("ok", "1.2")


def test_a_package_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "hanging", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "TIMEOUT_SECONDS", 0.2)
    assert "took more than" in try_imports(["hanging"])["hanging"].detail


def test_a_needed_package_that_is_missing_is_needed_and_has_a_remedy() -> None:
    answers = {package.module: ImportResult("absent", "not installed") for package in PACKAGES}
    found = {finding.name: finding for finding in packages.check_packages(answers)}
    assert found["deepspeed"].is_needed
    assert found["deepspeed"].remedy.startswith("pip install")
    assert not found["torchao"].is_needed


def test_every_page_names_the_same_command_for_a_package() -> None:
    """The doctor's list of packages, the doors of the libraries, docs/performance.md and the extras of setup.py."""
    remedies = {package.module: package.remedy for package in PACKAGES}
    assert remedies["flash_attn_interface"] == REQUIREMENTS["flash3"].remedy
    assert remedies["flash_attn"] == REQUIREMENTS["flash2"].remedy
    assert remedies["xformers"] == REQUIREMENTS["xformers"].remedy
    assert remedies["torchao"] == fp8.INSTALL_COMMANDS["fp8_torchao"]
    assert remedies["transformer_engine"] == fp8.INSTALL_COMMANDS["fp8_te"]
    assert remedies["apex.optimizers"] == optim.APEX_INSTALL
    page, setup = (ROOT / "docs/performance.md").read_text().replace('"', "'"), (ROOT / "setup.py").read_text()
    for command in fp8.INSTALL_COMMANDS.values():
        command = command.split(" (")[0]
        assert command in page
        assert f'"{command.split("[")[1].split("]")[0]}": [' in setup


def test_a_library_that_is_installed_is_not_advised_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = checks.CheckedRun(load_config(ROOT / "configs/vtp_l.yaml"), {})
    for answer, is_advised in ((ImportResult("ok", "2.20"), False), (ImportResult("absent", "not installed"), True)):
        [found] = [one for one in checks.linear_backends(plan, {"transformer_engine": answer}) if "fp8_te" in one.name]
        assert ("pip install" in found.remedy) == is_advised
        assert "NVIDIA GPU" in found.remedy


def test_the_exit_code_is_that_of_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def groups(*found: CheckResult) -> None:
        monkeypatch.setattr(__main__, "_groups", lambda options: [("devices", lambda: list(found))])

    groups(CheckResult("GPU 0", "ok", "one"), CheckResult("torchao", "absent", "not installed", "pip install torchao"))
    assert __main__.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    assert "A run is possible here, on the GPU." in shown
    assert "-> pip install torchao" in shown
    groups(CheckResult("deepspeed", "absent", "not installed", "pip install deepspeed", is_needed=True))
    assert __main__.main(["--quick"]) == 1
    assert "No run is possible yet:\n  deepspeed: pip install deepspeed" in capsys.readouterr().out


def test_a_config_that_does_not_load_is_a_finding(tmp_path: Path) -> None:
    options = __main__._parse(["--config", str(tmp_path / "none.yaml")])
    [found] = __main__._backends(options, {})
    assert (found.name, found.state, found.is_needed) == ("config", "broken", True)
    assert "none.yaml" in found.message


def test_a_check_that_raises_in_the_midst_keeps_what_it_found() -> None:
    def check() -> Iterator[CheckResult]:
        yield CheckResult("first", "ok", "found")
        raise OSError("libcuda.so\nand much more")

    assert run_check("second", check, "mend it") == [
        CheckResult("first", "ok", "found"),
        CheckResult("second", "broken", "OSError: libcuda.so", "mend it"),
    ]


def test_a_gpu_that_tells_nothing_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, visible, reason in (
        (None, None, "built for the CPU alone"),
        ("13.0", "-1", "CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0")
        [found] = checks.gpus()
        assert found.state == "absent"
        assert reason in found.message


def test_every_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=79 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first, second = checks.gpus()
    assert (first.name, second.name) == ("GPU 0", "GPU 1")
    assert first.message == "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB; CUDA 13.0, NCCL 2.28.3"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and its driver")
def test_a_gpu_is_found_measured_and_used() -> None:
    done = run_doctor("--json")
    report, found = json.loads(done.stdout), findings(done)
    lacking = [package for package in PACKAGES if package.is_needed and found[package.distribution]["state"] != "ok"]
    assert [package.distribution for package in lacking] in ([], ["nvidia-dali-cuda130"]), (
        "only DALI may be missing here"
    )
    assert done.returncode == len(lacking), done.stdout
    assert report["device"] == "GPU"
    assert found["GPU 0"]["said"].startswith(torch.cuda.get_device_name(0))
    if not lacking:
        assert found["decoding gpu"]["state"] == "ok"
    assert found["energy"]["said"].startswith("NVML's")
    assert found["product bfloat16"]["said"].endswith("on the GPU")
    assert found["compile in this run"]["said"].startswith("on")


def test_a_check_does_not_import_what_was_seen_to_crash() -> None:
    answers = {
        "nvidia.dali": ImportResult("broken", "importing it ended the process (exit code -11)"),
        "torch": PART_OF_TORCH,
    }

    def check() -> list[CheckResult]:
        raise AssertionError("it must not be called")

    [found] = __main__._check(answers, "decoding", check, ("torch", "nvidia.dali"))
    assert found.message == "not checked: nvidia.dali cannot be imported"
    assert found.is_needed


def test_a_chosen_backend_that_does_not_import_makes_a_run_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kernels.attention.resolve_attention", lambda *about: AttentionBackend("flash3", "named in the config")
    )
    plan = checks.CheckedRun(load_config(ROOT / "configs/vtp_l.yaml"), {})
    chosen = list(
        checks.attention_backends(plan, {"flash_attn_interface": ImportResult("broken", "undefined symbol")})
    )[-1]
    assert (chosen.state, chosen.is_needed) == ("broken", True)
    assert "system.attention=sdpa" in chosen.remedy


def test_limits_that_are_too_low_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**25))
    monkeypatch.setattr(checks, "smallest_tick", lambda: 0.015)
    found = {finding.name: finding for finding in checks.limits(tmp_path, shared=tmp_path)}
    assert {finding.state for finding in found.values()} == {"broken"}
    assert "ulimit -n" in found["open files"].remedy
    assert "--shm-size" in found["shared memory"].remedy
    absent = {finding.name: finding.state for finding in checks.limits(tmp_path, shared=tmp_path / "none")}
    assert absent["shared memory"] == "absent"


def test_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CGROUP_LIMIT", tmp_path / "memory.max")
    total, _ = checks.memory_bytes()
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.memory_bytes()[0] == total
    (tmp_path / "memory.max").write_text("5000000\n")
    assert checks.memory_bytes() == (5_000_000, 4_000_000)


def test_what_auto_becomes_is_what_a_run_resolves() -> None:
    config = load_config(ROOT / "configs/vtp_l.yaml", ["system.attention=sdpa", "system.optimizer=deepspeed"])
    plan = checks.CheckedRun(config, {"zero_optimization": {"stage": 3}})
    chosen = [finding for finding in checks.attention_backends(plan, {}) if finding.name == "attention in this run"]
    assert chosen[0].message == "sdpa (named in the config)"
    assert list(checks.optimizers(plan, {}))[-1].message == "adamw by deepspeed (named in the config)"


def test_the_loader_and_the_products_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiling.instruments.machine.matmul_peak", {torch.bfloat16: 1e11, torch.float32: 2e11}.get)
    found = {finding.name: finding for finding in checks.matmul_speed()}
    assert found["product float32"].message.startswith("0.20 TFLOP/s")
    assert "optim.precision=fp32" in found["bf16"].remedy
    [loader] = checks.loader_speed()
    assert loader.is_needed
    assert "images/s" in loader.message
