"""torch.profiler: a window of steps of a run on demand, and the time of a call by kind of kernel.

    deepspeed engine/launch.py --config configs/demo.yaml profile.steps=10:13      # records steps 10, 11 and 12

Steps count from 0 over the whole run: a resumed run has the window where the first one would have had it, or what is
left of it. For every rank in `profile.ranks` (the first by default) the window leaves

    RUN/profile/rank0-steps10-13.json.gz              Chrome's format: open in ui.perfetto.dev, or chrome://tracing
    RUN/profile/rank0-steps10-13.txt                  the operators that took longest
    RUN/tensorboard/profile/rank0-steps10-13.pt.trace.json.gz

The last is a copy of the first, where TensorBoard's PyTorch plugin looks for it (`pip install torch-tb-profiler`).
TensorBoard alone shows no traces, and the plugin is no longer developed (0.4.3 is its last release); torch's authors
recommend Perfetto. Steps are named ranges in the trace, under the plugin's names (ProfilerStep#10), and so are the
phases of a step (profiling/instruments/phases.py). Recording slows the steps of the window, and the first ones after it
a little.

    times = kernel_time(step)
    times.ms                # {"products": 61.2, "attention": 12.0, "fused": 9.4, ..., "idle": 3.1}
    times.slowest           # (("nvjet_tst_192x192_...", 21.5), ...): the kernels that took most

On CUDA kernels are classified by their names, which libraries choose and change: what no pattern matches is "other".
Where two run at once, the time counts for the one that began first, so that kinds and idle time add up to the time of
the call. Named ranges (record_function) are no kernels. On the CPU operators take the place of kernels, each with its
own time.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from configs import RunConfig
from profiling.instruments.phases import PhaseTimer


def new_profiler(**options: Any) -> profile:
    """Return torch.profiler.profile for one cycle, not yet started; `options` are its own.

    Without a GPU its library is silenced: it prints where it starts and stops, and in torch's CUDA build that it found
    no device. With one, its messages may be errors, and stay.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities, acc_events=True, **options)  # torch 2.11 warns without acc_events


NUM_OPERATORS = 40  # of the operator table


class ProfilerWindow:
    """Record the steps of one rank's window; as a context it is written even if the run ends inside it.

    `log` gets a line for a window that cannot be written; the run goes on.
    """

    def __init__(
        self, config: RunConfig, phases: PhaseTimer, run_dir: Path, rank: int, log: Callable[[str], object] = print
    ) -> None:
        is_recorded = config.profile.steps is not None and rank in config.profile.ranks
        self._first, self._end = config.profile.span if is_recorded else (0, 0)
        self._phases, self._run_dir, self._rank, self._log = phases, run_dir, rank, log
        self._profiler: profile | None = None
        self._range: record_function | None = None  # of the step that runs
        self._opened, self._done = 0, 0

    def __enter__(self) -> ProfilerWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._close()

    def before(self, step: int) -> None:
        """Open the window before its first step, or before one inside it where the run was resumed."""
        if self._profiler is None and self._first <= step < self._end:
            self._open(step)
        if self._profiler is not None:
            self._range = record_function(f"ProfilerStep#{step}")
            self._range.__enter__()

    def after(self, step: int) -> None:
        """Close the window after its last step."""
        self._done = step + 1
        self._end_range()
        if self._profiler is not None and self._done == self._end:
            self._close()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _open(self, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued belongs to steps before the window
        self._profiler, self._opened = new_profiler(record_shapes=True), step
        self._profiler.start()
        self._phases.is_traced = True

    def _close(self) -> None:
        assert self._profiler is not None
        self._end_range()
        self._phases.is_traced = False
        self._profiler.stop()
        record, self._profiler = self._profiler, None
        name = f"rank{self._rank}-steps{self._opened}-{self._done}"
        try:
            self._write(record, name)
        except OSError as error:
            self._log(f"could not write {self._run_dir}/profile/{name}: {error.strerror or error}")
        except Exception as error:  # an error of the profiler must not end a run
            self._log(f"could not write {self._run_dir}/profile/{name}: {type(error).__name__}: {error}")

    def _write(self, record: profile, name: str) -> None:
        """Write all files of a window; leave none of them where it raises."""
        folder, board = self._run_dir / "profile", self._run_dir / "tensorboard" / "profile"
        trace, table = folder / f"{name}.json.gz", folder / f"{name}.txt"
        copy = board / f"{name}.pt.trace.json.gz"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            for path in (folder, board):
                path.mkdir(parents=True, exist_ok=True)
            record.export_chrome_trace(str(trace))
            shutil.copyfile(trace, copy)
            table.write_text(record.key_averages().table(sort_by=by, row_limit=NUM_OPERATORS, max_name_column_width=60))
        except Exception:
            for path in (trace, table, copy):
                with suppress(OSError):
                    path.unlink()
            raise


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
    """Milliseconds of one call, by kind, the largest first, idle time included."""

    ms: dict[str, float]
    slowest: tuple[tuple[str, float], ...]  # names and milliseconds

    def __str__(self) -> str:
        whole = sum(self.ms.values())
        return ", ".join(f"{kind} {value:.1f} ms ({value / whole:.0%})" for kind, value in self.ms.items())


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    return next((kind for kind, known in KINDS.items() if re.search(known, name, re.IGNORECASE)), OTHER)


def kernel_time(call: Callable[[], object]) -> KernelTime:
    """Run `call` once under the profiler, which slows the host; call it before, to compile and allocate."""
    is_cuda = torch.cuda.is_available()
    with new_profiler() as record:
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
