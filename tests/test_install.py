"""Installing: which build of torch `make setup` chooses, and how the check of the pins reports conflicts."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import resolution
from tests.resolution import Resolution

pytestmark = pytest.mark.L0

ROOT = Path(__file__).resolve().parent.parent
TOOL = """#!/bin/sh
echo "{name} $*" >> "$CALLS"
case "{name} $*" in {refused}) echo "The conflict is caused by: $*"; echo "ERROR: not available" >&2; exit 1;; esac
"""


def set_up(directory: Path, has_gpu: bool = False, refused: str = "nothing") -> tuple[str, list[str]]:
    """Run `make setup` with a pip and a uv that only record their calls, and fail for calls that match `refused`."""
    calls, python = directory / "calls", directory / "python3"
    tools = {name: TOOL.format(name=name, refused=refused) for name in ("pip", "uv")}
    written = "".join(f"cat > $3/bin/{name} <<'END'\n{text}END\n" for name, text in tools.items())
    python.write_text(f"#!/bin/sh\nmkdir -p $3/bin\n{written}chmod +x $3/bin/*\n")
    python.chmod(0o755)
    words = [f"VENV={directory}/venv", f"PYTHON={python}", f"HAS_GPU={str(has_gpu).lower()}"]
    done = subprocess.run(
        ["make", "setup", *words], cwd=ROOT, env={**os.environ, "CALLS": str(calls)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in calls.read_text().splitlines() if "torch" in line or ".[dev]" in line]


def test_without_a_gpu_the_cpu_build_of_pips_index_is_installed(tmp_path: Path) -> None:
    output, calls = set_up(tmp_path)
    assert [call.split()[-1] for call in calls] == [f"{pin('torch')}+cpu", f"{pin('torch')}+cpu", ".[dev]"]
    assert ["--dry-run" in call for call in calls] == [True, False, False], "first whether it is there, in silence"
    assert "the CPU build, from pip's index" in output


def test_where_pips_index_has_none_uv_chooses_the_build(tmp_path: Path) -> None:
    output, calls = set_up(tmp_path, refused="pip*+cpu")
    assert "conflict" not in output, "that pip finds no such build is no error of the set-up"
    assert [line for line in output.splitlines() if "torch" in line.partition("==")[2]] == [
        "== set-up 2/3: torch, in the build for this machine",
        "== torch: asking pip's index for the CPU build",
        "== torch: asking uv for the build for this machine",
    ]
    assert "--torch-backend auto" in calls[1]
    assert [call.split()[-1] for call in calls] == [f"{pin('torch')}+cpu", pin("torch"), ".[dev]"]


def test_with_a_gpu_the_cpu_build_is_not_requested(tmp_path: Path) -> None:
    _, calls = set_up(tmp_path, has_gpu=True)
    assert [call.split()[-1] for call in calls] == [pin("torch"), ".[dev]"]


def test_where_no_special_build_is_available_the_set_up_installs_pypis(tmp_path: Path) -> None:
    output, calls = set_up(tmp_path, refused="pip*+cpu | uv*")
    assert calls[-1].endswith(".[dev]")
    assert "PyPI's serves every machine" in output


def pin(package: str) -> str:
    [line] = [line for line in resolution.CONSTRAINTS.read_text().splitlines() if line.startswith(f"{package}==")]
    return line


def check_with(monkeypatch: pytest.MonkeyPatch, results: dict[tuple[str, str], Resolution]) -> int:
    """Return the check's exit code for these results of uv; other cases resolve to a pinned package."""
    fine = (pin("torch"),)
    monkeypatch.setattr(resolution, "resolve", lambda p, e: results.get((p, e), Resolution(p, e, pins=fine)))
    return resolution.check()


def test_a_conflict_of_one_python_fails_the_check_by_name(monkeypatch, capsys) -> None:
    conflict = Resolution("3.12", "gpu", error="torch==2.13.0 depends on triton==3.7.1")
    assert check_with(monkeypatch, {("3.12", "gpu"): conflict}) == 1
    assert "Python 3.12, [gpu]: torch==2.13.0 depends on triton==3.7.1" in capsys.readouterr().err


def test_a_package_without_a_pin_fails_the_check(monkeypatch, capsys) -> None:
    assert check_with(monkeypatch, {("3.14", ""): Resolution("3.14", "", pins=("leftpad==1.0",))}) == 1
    assert "Python 3.14, base: not pinned in constraints.txt: ['leftpad==1.0']" in capsys.readouterr().err


def test_without_a_network_the_check_says_so_and_passes(monkeypatch, capsys) -> None:
    lost = {(p, e): Resolution(p, e, error="cause: dns error") for p in resolution.PYTHONS for e in resolution.EXTRAS}
    assert check_with(monkeypatch, lost) == 0
    assert "not checked: PyPI cannot be reached" in capsys.readouterr().out


def test_resolvable_pins_pass(monkeypatch, capsys) -> None:
    assert check_with(monkeypatch, {}) == 0
    assert "Python 3.10 to 3.14, extras dev, gpu, transformer-engine, onnx" in capsys.readouterr().out
