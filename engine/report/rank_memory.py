"""Memory of every rank, in a report: the least, the mean, the most, and which rank has the most.

    report(comm)      # {"memory/peak_min_gib": 61.2, "memory/peak_mean_gib": 61.9, "memory/peak_max_gib": 70.4,
                      #  "memory/peak_rank": 17.0, "memory/now_min_gib": ...}

`peak` is the most so far, `now` what is held at the report, `reserved` (CUDA) what the allocator took from the device
at most. On a CPU they are the process's resident memory, with its libraries, its loader and pages that ranks share.
The rank with the most is the one that runs out first: its number says where to look.
"""

from __future__ import annotations

import torch

from model.losses.comm import Comm
from profiling.instruments.memory import peak_and_current_bytes


def report(comm: Comm) -> dict[str, float]:
    """The same on every rank. A collective between hosts, of three numbers a rank."""
    held = peak_and_current_bytes()
    shared = torch.zeros(len(held), comm.world_size, dtype=torch.float64)
    shared[:, comm.rank] = torch.tensor(list(held.values()), dtype=torch.float64)
    values: dict[str, float] = {}
    for name, of_ranks in zip(held, (comm.all_sum(shared) / 2**30).tolist(), strict=True):
        values |= spread(name, of_ranks)
    return values


def spread(name: str, gib: list[float]) -> dict[str, float]:
    """Of "peak", [1.0, 3.0]: peak_min_gib 1.0, peak_mean_gib 2.0, peak_max_gib 3.0, peak_rank 1.0"""
    most = max(gib)
    sizes = {"min": min(gib), "mean": sum(gib) / len(gib), "max": most}
    return {f"memory/{name}_{key}_gib": size for key, size in sizes.items()} | {
        f"memory/{name}_rank": float(gib.index(most))
    }
