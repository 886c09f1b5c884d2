"""Which kinds of kernels a call spends its time in, and how much of that time nothing runs: torch.profiler, summed up.

    found = kernel_time(step)
    found.ms                # {"products": 61.2, "attention": 12.0, "fused": 9.4, ..., "idle": 3.1}
    found.slowest           # (("nvjet_tst_192x192_...", 21.5), ...): the kernels that took most

On CUDA kernels are told apart by their names, which libraries choose and change: what no pattern knows is "other".
Those of one stream add up; where two run at once, the time counts for the one that began first, so that kinds and idle
time together are the time of the call. Named ranges (record_function) are no kernels: the profiler lays each over those
launched inside it, gaps included. On the CPU operators take the place of kernels, each with its own time.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

from profiling.torch_profiler import recording

IDLE, OTHER = "idle", "other"
KINDS = {  # the first pattern that is found in a name decides
    "collectives": r"nccl",
    "attention": r"flash|fmha|attention|sdpa|varlen",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|wgrad|aten::(add|b|badd)?(mm|bmm)$|scaled_mm",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy|aten::(to|_to_copy|cat|fill_|zero_)$",
    "fused": r"^triton_|CompiledFxGraph|CompiledFunction",
    "elementwise": r"elementwise|reduce|softmax|norm|index|scatter|gather|aten::",
}
NUM_SLOWEST = 8

Span = tuple[str, int, int]  # a kernel's name, begin and end in nanoseconds


@dataclass(frozen=True)
class KernelTime:
    """Of one call. `ms` has every kind that took time, the largest first, and idle."""

    ms: dict[str, float]
    slowest: tuple[tuple[str, float], ...]  # names and milliseconds

    def __str__(self) -> str:
        whole = sum(self.ms.values())
        return ", ".join(f"{kind} {value:.1f} ms ({value / whole:.0%})" for kind, value in self.ms.items())


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    return next((kind for kind, known in KINDS.items() if re.search(known, name, re.IGNORECASE)), OTHER)


def kernel_time(call: Callable[[], object]) -> KernelTime:
    """Runs `call` once under the profiler, which slows the host down; call it before, to compile and allocate."""
    is_cuda = torch.cuda.is_available()
    with recording() as record:
        begin = time.perf_counter_ns()
        call()
        if is_cuda:
            torch.cuda.synchronize()
        whole = time.perf_counter_ns() - begin
    if is_cuda:
        own = own_nanoseconds(kernel_spans(record.profiler.kineto_results.events()))
    else:
        own = Counter({each.key: round(1000 * each.self_cpu_time_total) for each in record.key_averages()})
    return _summed(own, whole)


def kernel_spans(events: Iterable[Any]) -> Iterator[Span]:
    """Kernels, copies and fills on the GPU, of the profiler's events (torch._C._autograd._KinetoEvent)."""
    for event in events:
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            yield event.name(), event.start_ns(), event.start_ns() + event.duration_ns()


def own_nanoseconds(spans: Iterable[Span]) -> Counter[str]:
    """Nanoseconds by name, what runs beside something that began before it not counted twice."""
    own, reached = Counter[str](), 0
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        own[name] += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return own


def _summed(own: Counter[str], whole: int) -> KernelTime:
    kinds = Counter[str]()
    for name, nanoseconds in own.items():
        kinds[kind_of(name)] += nanoseconds
    kinds[IDLE] = max(0, whole - own.total())
    return KernelTime(
        {kind: nanoseconds / 1e6 for kind, nanoseconds in kinds.most_common() if nanoseconds},
        tuple((name, nanoseconds / 1e6) for name, nanoseconds in own.most_common(NUM_SLOWEST)),
    )
