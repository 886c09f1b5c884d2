"""Peak memory of a call, in tensor bytes.

    peak_bytes(lambda: loss(x).backward())      # above what was allocated when the call began

On CUDA the allocator's own counter. On the CPU, where there is none, the running sum of every allocation and release
that torch's profiler records: exact for tensors, blind to what libraries allocate behind torch's back (oneDNN's packed
weights).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STATM = Path("/proc/self/statm")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes held at one moment during `call`, beyond those held before."""
    if torch.cuda.is_available():
        return _cuda_peak(call)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


def process_peak_bytes() -> int:
    """The most this process has held so far: on CUDA by the allocator, else resident, libraries and all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def held() -> dict[str, int]:
    """What this process holds at the moment, in bytes by name: on CUDA as its allocator counts, else resident."""
    if torch.cuda.is_available():
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "most allocated": torch.cuda.max_memory_allocated(),
            "of the device": torch.cuda.mem_get_info()[1],
        }
    return {"most resident": process_peak_bytes()}


def peak_and_now() -> dict[str, int]:
    """What this process has held at most so far ("peak"), and holds now; no device is waited for.

    On CUDA tensors' memory as the allocator counts it, and "reserved", the most that it had taken from the device to
    serve them; else resident memory, libraries and all, and "now" only where the system has /proc.
    """
    if torch.cuda.is_available():
        return {
            "peak": torch.cuda.max_memory_allocated(),
            "now": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    return {"peak": process_peak_bytes(), **_resident()}


def _resident() -> dict[str, int]:
    try:
        pages = int(STATM.read_text().split()[1])
    except OSError:
        return {}
    return {"now": pages * resource.getpagesize()}


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
