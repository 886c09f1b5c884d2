"""Peak memory of a call, in tensor bytes.

    peak_bytes(lambda: loss(x).backward())      # above what was allocated when the call began

On CUDA the allocator's own counter. On the CPU, where there is none, the running sum of every allocation and release
that torch's profiler records: exact for tensors, blind to what libraries allocate behind torch's back (oneDNN's packed
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

from profiling.torch_profiler import recording

STATM = Path("/proc/self/statm")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes held at one moment during `call`, beyond those held before."""
    if torch.cuda.is_available():
        return _cuda_peak(call)
    with recording(profile_memory=True) as record:
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


def resident_bytes() -> int:
    """What this process holds at the moment: on CUDA by the allocator, else resident, 0 where nobody says it."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.is_file() else 0


def tensor_bytes() -> dict[int, int]:
    """Address -> bytes of the storage of every tensor alive, the hidden shards of partitioned parameters included."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, Parameter):
            for tensor in (thing, getattr(thing, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


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
