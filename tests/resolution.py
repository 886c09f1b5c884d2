"""Check that setup.py and its extras resolve on PyPI alone, for each supported Python, with the pins of the project.

    python -m tests.resolution            # part of `make checks`: exit code 1 on a conflict; skipped without a network
    python -m tests.resolution --update   # rewrite constraints.txt: consistent pins are kept, others replaced

The resolver is uv, which reads package metadata only: no wheel is downloaded and nothing is installed. pip's and uv's
configuration on this machine (mirrors, local wheels, upper bounds) is not read: others do not have it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
EXTRAS = ("", "dev", "gpu", "transformer-engine", "onnx")
PLATFORM = "x86_64-unknown-linux-gnu"
HEADER = """\
# The versions this release is tested with, consistent with each other on PyPI for Python 3.10 to 3.14 and all extras.
# Written by `python -m tests.resolution --update`, checked by `make checks`. `torch` has no local tag: a CPU build of
# the same version, where pip is offered one, satisfies the pin too, and then nothing of CUDA is installed.
"""
NO_NETWORK = re.compile(
    r"dns error|error sending request|network was disabled|Connection refused|timed out", re.IGNORECASE
)


@dataclass(frozen=True)
class Resolution:
    """Result of uv for one Python and one extra: the pins as `name==version`, or the error."""

    python: str
    extra: str
    pins: tuple[str, ...] = ()
    error: str = ""

    @property
    def is_unreachable(self) -> bool:
        return bool(NO_NETWORK.search(self.error))

    def __str__(self) -> str:
        return f"Python {self.python}, {f'[{self.extra}]' if self.extra else 'base'}"


def uv_environment() -> dict[str, str]:
    """Return the environment without the variables that configure uv or pip; one retry only, in case of no network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_"))}
    return {**kept, "UV_NO_CONFIG": "1", "UV_HTTP_RETRIES": "1"}


def find_uv() -> str:
    """Return the path of uv, that of this Python's environment first."""
    return shutil.which("uv", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}") or "uv"


def resolve(python: str, extra: str, constraints: Path = CONSTRAINTS) -> Resolution:
    """Resolve setup.py with one extra for one Python against PyPI alone."""
    command = [
        find_uv(), "pip", "compile", "setup.py", "--quiet", "--no-header", "--no-annotate",
        "--python-version", python, "--python-platform", PLATFORM, "--constraints", str(constraints),
        *(("--extra", extra) if extra else ()),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=uv_environment(), capture_output=True, text=True)
    if done.returncode:
        return Resolution(python, extra, error=done.stderr.strip())
    return Resolution(python, extra, pins=tuple(done.stdout.split()))


def unpinned(resolution: Resolution, constraints: str) -> list[str]:
    """List the packages of a resolution that constraints.txt does not pin, which would change from day to day."""
    pinned = {line.split("==")[0] for line in constraints.splitlines() if "==" in line}
    return [pin for pin in resolution.pins if pin.split("==")[0] not in pinned]


def check() -> int:
    """Resolve every Python with every extra; print each conflict; return the exit code."""
    cases = [(python, extra) for python in PYTHONS for extra in EXTRAS]
    first = resolve(*cases[0])  # alone: shows whether there is a network, and fills uv's cache for the others
    if first.is_unreachable:
        print("pins not checked: PyPI cannot be reached from here (checked wherever there is a network)")
        return 0
    with ThreadPoolExecutor(4) as pool:
        resolutions = [first, *pool.map(lambda case: resolve(*case), cases[1:])]
    failures = 0
    for resolution in resolutions:
        loose = unpinned(resolution, CONSTRAINTS.read_text())
        if resolution.error or loose:
            failures += 1
            print(f"{resolution}: {resolution.error or f'not pinned in constraints.txt: {loose}'}", file=sys.stderr)
    if failures:
        print(f"{failures} of {len(cases)} sets cannot be installed as pinned; correct setup.py, or rewrite the pins: "
              "python -m tests.resolution --update", file=sys.stderr)  # fmt: skip
        return 1
    print(f"pins resolve on PyPI alone: Python {PYTHONS[0]} to {PYTHONS[-1]}, extras {', '.join(filter(None, EXTRAS))}")
    return 0


def update() -> int:
    """Rewrite constraints.txt from one resolution for all Pythons and extras; pins that fit are kept."""
    command = [
        find_uv(), "pip", "compile", "setup.py", "--quiet", "--all-extras", "--universal",
        "--no-header", "--no-annotate", "--python-version", PYTHONS[0], "--output-file", str(CONSTRAINTS),
    ]  # fmt: skip
    environment = uv_environment()
    del environment["UV_NO_CONFIG"]  # pyproject.toml lists which platforms and Pythons the universal resolution covers
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        return 1
    CONSTRAINTS.write_text(HEADER + "".join(f"{shorten(line)}\n" for line in CONSTRAINTS.read_text().splitlines()))
    print(f"wrote {CONSTRAINTS}")
    return 0


def shorten(pin: str) -> str:
    """Reduce a pin's marker to its Python version: a pin applies only where its package is required."""
    name, _, marker = pin.partition(" ; ")
    clauses = [c for c in re.findall(r"python_full_version [<>=]+ '[^']*'", marker) if "3.15" not in c]
    return f"{name} ; {' and '.join(clauses)}" if clauses else name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--update", action="store_true", help="rewrite constraints.txt instead of checking it")
    sys.exit(update() if parser.parse_args().update else check())
