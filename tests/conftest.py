"""One thread for the test process: its tensors are tiny, and the ranks it starts need the cores. The accelerator is
named, so that DeepSpeed does not look for one in every rank; only `-m gpu` sees GPUs. Triton, which reads this once,
interprets its kernels where there is no GPU."""

import os

import pytest
import torch

torch.set_num_threads(1)

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` asks for tiers: a test that has none would never run, and nobody would notice."""
    without = [item.nodeid for item in items if not TIERS & {mark.name for mark in item.iter_markers()}]
    if without:
        raise pytest.UsageError(f"no tier ({', '.join(sorted(TIERS))}): {', '.join(without)}")
