"""Which packages are there, in which version, and whether they import.

packages(ask([package.module for package in PACKAGES]))      # Finding("torch", "ok", "2.13.0+cpu: tensors, ..."), ...
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from profiling.checks.finding import Finding
from profiling.checks.imports import Answer

INSTALL = "pip install -e . -c constraints.txt"
# As kernels/ and engine/ say them, which do not import where torch is missing; tests/profiling/test_doctor.py compares.
TRANSFORMER_ENGINE = (
    "pip install --no-build-isolation -e '.[transformer-engine]' -c constraints.txt (compiles, with CUDA's toolkit)"
)
APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(compiles, with CUDA's toolkit)"
)


@dataclass(frozen=True)
class Package:
    """What is imported, whose version counts where the module names none, and what it is there for."""

    module: str
    distribution: str
    purpose: str
    remedy: str = INSTALL
    is_needed: bool = True


PACKAGES = (
    Package("torch", "torch", "tensors and gradients"),
    Package("deepspeed", "deepspeed", "ZeRO"),
    Package("nvidia.dali", "nvidia-dali-cuda130", "decodes images"),
    Package("tokenizers", "tokenizers", "captions to token ids"),
    Package("webdataset", "webdataset", "writes shards"),
    Package("fsspec", "fsspec", "reads shards by URL"),
    Package("safetensors", "safetensors", "checkpoints and weights"),
    Package("tensorboard", "tensorboard", "curves of a run"),
    Package("pydantic", "pydantic", "settings"),
    Package("rich", "rich", "tables and bars on a terminal"),
    Package("pynvml", "nvidia-ml-py", "energy of a GPU", is_needed=False),
    Package("triton", "triton", "kernels of our own on GPUs, and torch.compile there",
            "pip install triton -c constraints.txt", False),
    Package("torchao", "torchao", "system.linear=fp8_torchao", "pip install -e '.[gpu]' -c constraints.txt", False),
    Package("transformer_engine", "transformer-engine", "system.linear=fp8_te", TRANSFORMER_ENGINE, False),
    Package("flash_attn_interface", "flash-attn-3", "system.attention=flash3, for Hopper GPUs",
            "pip install --no-deps flash-attn-3 --index-url https://download.pytorch.org/whl/cu130", False),
    Package("flash_attn", "flash-attn", "system.attention=flash2; the same kernel as torch's varlen",
            "pip install --no-build-isolation flash-attn (compiles for about half an hour)", False),
    Package("xformers", "xformers", "system.attention=xformers; its wheels are for one torch each",
            "pip install --no-build-isolation --no-binary xformers xformers (compiles)", False),
    Package("apex.optimizers", "apex", "system.optimizer=apex; the package apex on PyPI is another one", APEX, False),
)  # fmt: skip


def packages(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """Python, this package, and every one of PACKAGES."""
    is_known = (3, 10) <= sys.version_info < (3, 15)
    yield Finding(
        "python",
        "ok" if is_known else "broken",
        f"{platform.python_version()}, {sys.executable}",
        "" if is_known else "use Python 3.10 to 3.14",
        is_needed=True,
    )
    yield Finding("vtp-engine", "ok", _version("vtp-engine") or "run from its sources, not installed")
    for package in PACKAGES:
        yield _finding(package, answers[package.module])


def _finding(package: Package, answer: Answer) -> Finding:
    if answer.state == "ok":
        version = answer.said or _version(package.distribution) or "of unknown version"
        return Finding(package.distribution, "ok", f"{version}: {package.purpose}", is_needed=package.is_needed)
    said, remedy = f"{answer.said} ({package.purpose})", package.remedy
    if answer.state == "broken":
        remedy = f"it is installed and does not import: install it anew, built for this torch and CUDA; {remedy}"
    return Finding(package.distribution, answer.state, said, remedy, package.is_needed)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
