"""glibc's malloc, told to keep what a step frees; for runs that compute on the CPU.

By itself it hands every block above 32 MiB back to the kernel as soon as it is freed, and the kernel clears every page
of the next one anew. Activations of a packed pass are of that size, so that a step waits for pages it had a moment
before: a fifth of a step of vtp_s on two cores. The price is 5 to 8 % more memory (docs/decisions/step.md).
"""

from __future__ import annotations

import ctypes
import os

import torch

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
ITS_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_blocks(device: torch.device) -> str:
    """Sets malloc for the life of the process, where steps run on the CPU; gives what it did and why, in words."""
    if device.type != "cpu":
        return "as found (steps run on the GPU)"
    named = [name for name in ITS_VARIABLES if name in os.environ]
    if named:
        return f"as found ({named[0]} is set)"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "as found (this C library has no mallopt)"
    is_set = mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1)
    return "freed blocks are kept (a step asks for the same again)" if is_set else "as found (mallopt refused)"
