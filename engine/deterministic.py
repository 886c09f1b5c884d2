"""Two runs of one config on the same machines, bit by bit the same: system.deterministic.

    enforce(config, device)      # before anything is computed; "on (system.deterministic): ..."

The engine itself is: data, views, noise and masks are functions of seed and step, models draw nothing, sums over ranks
are taken in one order. What is left are kernels that add in whatever order threads arrive, on GPUs. torch is told to
use others, or to raise where there are none; cuBLAS gets a workspace of its own for each stream; cuDNN and the compiler
choose without timing; attention takes a backend that can (kernels/attention.py). Our own kernels use no atomics.

Not covered: another number of ranks, another GPU, another version of a library; NCCL, which sums in one order as long
as topology and algorithm are the same (NCCL_ALGO).
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from configs import RunConfig, UserError

WORKSPACE = ":4096:8"  # eight buffers of 4 MiB: what cuBLAS's documentation gives for reproducible products


def enforce(config: RunConfig, device: torch.device) -> str:
    """Sets it for the life of the process, where system.deterministic asks for it; says so. UserError where it cannot
    be."""
    if not config.system.deterministic:
        return "no more than it comes (system.deterministic=false)"
    if device.type == "cuda" and config.system.loader.device != "cpu" and config.kind != "generator":
        raise UserError(
            f"system.deterministic=true but system.loader.device={config.system.loader.device}: pictures would be "
            "decoded on the GPU, and nobody promises the same bits twice; set system.loader.device=cpu"
        )
    found = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    if found not in (WORKSPACE, ":16:8"):
        raise UserError(
            f"system.deterministic=true but CUBLAS_WORKSPACE_CONFIG={found}: cuBLAS is reproducible with {WORKSPACE} "
            "or :16:8; unset the variable"
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, and costs a write of every new tensor
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    setattr(import_module("torch._inductor.config"), "deterministic", True)  # noqa: B010
    return "on (system.deterministic): torch, cuBLAS, cuDNN and the compiler use fixed orders"
