"""Try to import every package in another process, and report versions: a crash on import ends that process alone.

    results = try_imports(["torch", "torchao"])
    # {"torch": ImportResult("ok", "2.13.0+cpu"), "torchao": ImportResult("broken", "ImportError: undefined symbol:
    # ...")}
    check_packages(results)        # CheckResult("torch", "ok", "2.13.0+cpu: tensors, ..."), ...

This file is the other process's program, too: `python profiling/doctor/packages.py torch torchao` writes a line of JSON
for each. Where the process dies, the package it was importing is broken, and a new process goes on after it. Standard
library alone, as nothing else may be installed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Literal

State = Literal["ok", "absent", "broken"]  # broken: installed, and does not work
TIMEOUT_SECONDS = 300.0  # for all packages together
INSTALL = "pip install -e . -c constraints.txt"
# As in kernels/ and engine/, which do not import where torch is missing; tests/profiling/test_doctor.py compares.
TRANSFORMER_ENGINE = (
    "pip install --no-build-isolation -e '.[transformer-engine]' -c constraints.txt (compiles, with CUDA's toolkit)"
)
APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(compiles, with CUDA's toolkit)"
)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check. `is_needed`: no run is possible without it; a remedy is given for all but "ok"."""

    name: str
    state: State
    message: str
    remedy: str = ""
    is_needed: bool = False

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.remedy, f"{self.name} is {self.state}, without a remedy"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "state": self.state, "said": self.message, "remedy": self.remedy,
                "is_needed": self.is_needed}  # fmt: skip


@dataclass(frozen=True)
class ImportResult:
    """`detail` is the version where the state is ok ("" where the package has none), else the reason."""

    state: State
    detail: str


@dataclass(frozen=True)
class PackageCheck:
    """The module to import, its distribution (whose version counts where the module has none), and its purpose."""

    module: str
    distribution: str
    purpose: str
    remedy: str = INSTALL
    is_needed: bool = True


PACKAGES = (
    PackageCheck("torch", "torch", "tensors and gradients"),
    PackageCheck("deepspeed", "deepspeed", "ZeRO"),
    PackageCheck("nvidia.dali", "nvidia-dali-cuda130", "decodes images"),
    PackageCheck("tokenizers", "tokenizers", "captions to token ids"),
    PackageCheck("webdataset", "webdataset", "writes shards"),
    PackageCheck("fsspec", "fsspec", "reads shards by URL"),
    PackageCheck("safetensors", "safetensors", "checkpoints and weights"),
    PackageCheck("tensorboard", "tensorboard", "curves of a run"),
    PackageCheck("pydantic", "pydantic", "settings"),
    PackageCheck("rich", "rich", "tables and bars on a terminal"),
    PackageCheck("pynvml", "nvidia-ml-py", "energy of a GPU", is_needed=False),
    PackageCheck("triton", "triton", "kernels of our own on GPUs, and torch.compile there",
                 "pip install triton -c constraints.txt", False),
    PackageCheck("torchao", "torchao", "system.linear=fp8_torchao",
                 "pip install -e '.[gpu]' -c constraints.txt", False),
    PackageCheck("transformer_engine", "transformer-engine", "system.linear=fp8_te", TRANSFORMER_ENGINE, False),
    PackageCheck("flash_attn_interface", "flash-attn-3", "system.attention=flash3, for Hopper GPUs",
                 "pip install --no-deps flash-attn-3 --index-url https://download.pytorch.org/whl/cu130", False),
    PackageCheck("flash_attn", "flash-attn", "system.attention=flash2; the same kernel as torch's varlen",
                 "pip install --no-build-isolation flash-attn (compiles for about half an hour)", False),
    PackageCheck("xformers", "xformers", "system.attention=xformers; its wheels are for one torch each",
                 "pip install --no-build-isolation --no-binary xformers xformers (compiles)", False),
    PackageCheck("apex.optimizers", "apex", "system.optimizer=apex; the package apex on PyPI is another one",
                 APEX, False),
)  # fmt: skip


def run_check(
    name: str, check: Callable[[], Iterable[CheckResult]], remedy: str, is_needed: bool = False
) -> list[CheckResult]:
    """Results of `check`; if it raises, those before and one with the error. A broken library may raise anything."""
    results: list[CheckResult] = []
    try:
        results.extend(check())
    except (Exception, SystemExit) as error:
        results.append(CheckResult(name, "broken", first_line(error), remedy, is_needed))
    return results


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_packages(results: Mapping[str, ImportResult]) -> Iterator[CheckResult]:
    """Python, this package, and every one of PACKAGES."""
    is_known = (3, 10) <= sys.version_info < (3, 15)
    yield CheckResult(
        "python",
        "ok" if is_known else "broken",
        f"{platform.python_version()}, {sys.executable}",
        "" if is_known else "use Python 3.10 to 3.14",
        is_needed=True,
    )
    yield CheckResult("vtp-engine", "ok", _version("vtp-engine") or "run from its sources, not installed")
    for package in PACKAGES:
        result, distribution = results[package.module], package.distribution
        if result.state == "ok":
            version = result.detail or _version(distribution) or "of unknown version"
            yield CheckResult(distribution, "ok", f"{version}: {package.purpose}", is_needed=package.is_needed)
            continue
        message, remedy = f"{result.detail} ({package.purpose})", package.remedy
        if result.state == "broken":
            remedy = f"it is installed and does not import: reinstall it, built for this torch and CUDA; {remedy}"
        yield CheckResult(distribution, result.state, message, remedy, package.is_needed)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def try_imports(modules: list[str]) -> dict[str, ImportResult]:
    """A result for every module, in their order."""
    results: dict[str, ImportResult] = {}
    end = time.monotonic() + TIMEOUT_SECONDS
    while waiting := modules[len(results) :]:
        lines, failure = _import_in_process(waiting, max(1.0, end - time.monotonic()))
        for line in lines:
            module, state, detail = json.loads(line)
            results[module] = ImportResult(state, detail)
        if len(lines) < len(waiting):
            results[waiting[len(lines)]] = ImportResult("broken", failure)
    return results


def _import_in_process(modules: list[str], seconds: float) -> tuple[list[str], str]:
    """The lines that came, and how the process ended."""
    with subprocess.Popen(
        [sys.executable, __file__, *modules], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
            last = errors.strip().splitlines()[-1:]
            failure = f"importing it ended the process (exit code {process.returncode}): {' '.join(last)}".rstrip(": ")
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            failure = f"importing it took more than {seconds:.0f} s"
    return out.splitlines(), failure


def _try_import(module: str) -> tuple[State, str]:
    try:
        if find_spec(module.partition(".")[0]) is None:
            return "absent", "not installed"
        return "ok", str(getattr(import_module(module), "__version__", ""))
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        return "broken", f"{type(error).__name__}: {lines[0]}"


def _main(modules: list[str]) -> None:
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print while they are imported
    for module in modules:
        print(json.dumps([module, *_try_import(module)]), file=results, flush=True)
    results.flush()
    os._exit(0)  # what libraries print at exit is no result


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are no packages
    _main(sys.argv[1:])
