"""Settings of the whole process: garbage collection by hand, malloc that keeps freed blocks, deterministic kernels.

with manual_garbage_collection():
    for step in ...:
        if is_report: gc.collect()
keep_freed_blocks(device)              # a summary; malloc for steps on the CPU
enforce_determinism(config, device)    # before anything is computed; "on (system.deterministic): ..."
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from configs import RunConfig, UserError

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
WORKSPACE = ":4096:8"  # eight buffers of 4 MiB: what cuBLAS's documentation gives for reproducible products


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Collect garbage inside the `with` only where `gc.collect()` is called, and only of objects made inside.

    By itself Python collects whenever allocations have piled up, on every rank at another moment, and a full pass looks
    at every object there is: the rank that collects makes all others wait in the next collective. In the loop it is
    off; what lives before the loop is frozen, that is never looked at again; and at reports, on all ranks at the same
    step, the little that is new is collected. Afterwards all is as before.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def keep_freed_blocks(device: torch.device) -> str:
    """Make glibc's malloc keep freed blocks for the life of the process, where steps run on the CPU; return a summary.

    By itself it hands every block above 32 MiB back to the kernel as soon as it is freed, and the kernel clears every
    page of the next one anew. Activations of a packed pass are of that size, so that a step waits for pages it had a
    moment before: a fifth of a step of vtp_s on two cores. The price is 5 to 8 % more memory (docs/decisions/step.md).
    """
    if device.type != "cpu":
        return "as found (steps run on the GPU)"
    named = [name for name in MALLOC_VARIABLES if name in os.environ]
    if named:
        return f"as found ({named[0]} is set)"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "as found (this C library has no mallopt)"
    is_set = mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1)
    return "freed blocks are kept (a step asks for the same again)" if is_set else "as found (mallopt refused)"


def enforce_determinism(config: RunConfig, device: torch.device) -> str:
    """Make two runs of one config on the same hosts bitwise equal, where system.deterministic is on; return a summary.

    The engine itself is deterministic: data, views, noise and masks are functions of seed and step, models draw no
    random numbers, sums over ranks are taken in one order. What is left are kernels that add in whatever order threads
    arrive, on GPUs. torch is told to use others, or to raise where there are none; cuBLAS gets a workspace of its own
    for each stream; cuDNN and the compiler choose without timing; attention takes a backend that can
    (kernels/attention.py). Our own kernels use no atomics. Raises UserError where a setting prevents it.

    Not covered: another number of ranks, another GPU, another version of a library; NCCL, which sums in one order as
    long as topology and algorithm are the same (NCCL_ALGO).
    """
    if not config.system.deterministic:
        return "no more than it comes (system.deterministic=false)"
    if device.type == "cuda" and config.system.loader.device != "cpu" and config.kind != "generator":
        raise UserError(
            f"system.deterministic=true but system.loader.device={config.system.loader.device}: images would be "
            "decoded on the GPU, which promises no equal bits; set system.loader.device=cpu"
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
