"""Measure memory: the peak of a call in tensor bytes, and what this process holds.

    peak_bytes(lambda: loss(x).backward())      # above what was allocated when the call began

On CUDA by the allocator's own counter. On the CPU, which has none, by the running sum of every allocation and release
that torch's profiler records: exact for tensors, blind to what libraries allocate without torch (oneDNN's packed
weights).
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from profiling.instruments.profiler import new_profiler

STATM = Path("/proc/self/statm")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes held at one moment during `call`, beyond those held before."""
    if torch.cuda.is_available():
        return _cuda_peak(call)
    with new_profiler(profile_memory=True) as record:
        result = call()
    del result
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def process_peak_bytes() -> int:
    """The most this process has held so far: on CUDA by the allocator, else resident, libraries included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int:
    """What this process holds now: on CUDA by the allocator, else resident, 0 where the system has no /proc."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _resident().get("now", 0)


def tensor_bytes() -> dict[int, int]:
    """Address -> bytes of the storage of every tensor alive, hidden shards of partitioned parameters included."""
    gc.collect()
    sizes = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, Parameter):
            for tensor in (each, getattr(each, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sizes


def memory_in_use() -> dict[str, int]:
    """What this process holds now, in bytes by name: on CUDA as its allocator counts, else resident."""
    if torch.cuda.is_available():
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "most allocated": torch.cuda.max_memory_allocated(),
            "of the device": torch.cuda.mem_get_info()[1],
        }
    return {"most resident": process_peak_bytes()}


def peak_and_current_bytes() -> dict[str, int]:
    """The most that this process has held so far ("peak"), and what it holds now; waits for no device.

    On CUDA tensors' memory as the allocator counts it, and "reserved", the most that it had taken from the device to
    serve them; else resident memory, libraries included, and "now" only where the system has /proc.
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
