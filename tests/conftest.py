"""One thread for the test process: its tensors are tiny, and the ranks it starts need the cores. The accelerator is
named, so that DeepSpeed does not look for one in every rank; only `-m gpu` sees GPUs. Triton, which reads this once,
interprets its kernels where there is no GPU."""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TIERS = {"L0", "L1", "L2", "gpu", "demo"}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before anything asks CUDA, which looks once: tests of the CPU find none, whatever the machine has."""
    if "gpu" not in (config.getoption("markexpr") or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # asked otherwise, CUDA stands no fork: tests/harness.py
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu` a file that imports a package which is not installed is skipped, and the package named."""
    report = yield
    assert report.call is not None
    cause = report.call.excinfo and report.call.excinfo.value.__cause__
    is_absent = isinstance(cause, ModuleNotFoundError) and not (ROOT / str(cause.name).partition(".")[0]).exists()
    if "gpu" in (collector.config.getoption("markexpr") or "") and is_absent:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"not installed: {cause.name}")
        # Half of it stays imported: a file that imports this one would miss the other half, not the package.
        sys.modules.pop(".".join(collector.path.relative_to(ROOT).with_suffix("").parts), None)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` asks for tiers: a test that has none would never run, and nobody would notice."""
    without = [item.nodeid for item in items if not TIERS & {mark.name for mark in item.iter_markers()}]
    if without:
        raise pytest.UsageError(f"no tier ({', '.join(sorted(TIERS))}): {', '.join(without)}")
