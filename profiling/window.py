"""A window of steps under torch's profiler, on demand: every operator and kernel, for a person to look at.

    deepspeed engine/launch.py --config configs/demo.yaml profile.steps=10:13      # records steps 10, 11 and 12

Steps count from 0 over the whole run, so a resumed run has the window where the first one would have had it, or what is
left of it. For every rank in `profile.ranks` (the first by default) the window leaves

    RUN/profile/rank0-steps10-13.json.gz              Chrome's format: open in ui.perfetto.dev, or chrome://tracing
    RUN/profile/rank0-steps10-13.txt                  the operators that took longest
    RUN/tensorboard/profile/rank0-steps10-13.pt.trace.json.gz

The last is a copy of the first, where TensorBoard's PyTorch plugin looks for it (`pip install
torch-tb-profiler`). TensorBoard alone shows no traces, and the plugin is no longer developed (0.4.3 is its last
release); Perfetto is what torch's authors point to.

Steps are named ranges in the trace, in the words by which the plugin knows them (ProfilerStep#10), and so are the
phases of a step (profiling/phases.py). Recording slows the steps of the window,
and the first ones after it a little; the reports that hold them say so in their speed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import profile, record_function

from configs import Run
from profiling.phases import Phases
from profiling.torch_profiler import recording

ROWS = 40  # of the operator table


class Window:
    """The window of one rank; a context, so that one that is open when the run ends is written too.

    `say` hears of a window that cannot be written; the run goes on.
    """

    def __init__(
        self, config: Run, phases: Phases, run_dir: Path, rank: int, say: Callable[[str], object] = print
    ) -> None:
        is_recorded = config.profile.steps is not None and rank in config.profile.ranks
        self._first, self._end = config.profile.span if is_recorded else (0, 0)
        self._phases, self._run_dir, self._rank, self._say = phases, run_dir, rank, say
        self._record: profile | None = None
        self._range: record_function | None = None  # of the step that runs
        self._opened, self._done = 0, 0

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is not None:
            self._close()

    def before(self, step: int) -> None:
        """Opens the window when its first step is next, or one inside it where the run was resumed."""
        if self._record is None and self._first <= step < self._end:
            self._open(step)
        if self._record is not None:
            self._range = record_function(f"ProfilerStep#{step}")
            self._range.__enter__()

    def after(self, step: int) -> None:
        """Closes the window when its last step is done."""
        self._done = step + 1
        self._end_range()
        if self._record is not None and self._done == self._end:
            self._close()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _open(self, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued belongs to steps before the window
        self._record, self._opened = recording(record_shapes=True), step
        self._record.start()
        self._phases.is_traced = True

    def _close(self) -> None:
        assert self._record is not None
        self._end_range()
        self._phases.is_traced = False
        self._record.stop()
        record, self._record = self._record, None
        name = f"rank{self._rank}-steps{self._opened}-{self._done}"
        try:
            self._write(record, name)
        except OSError as error:
            self._say(f"could not write {self._run_dir}/profile/{name}: {error.strerror or error}")
        except Exception as error:  # an error of the profiler must not end a run
            self._say(f"could not write {self._run_dir}/profile/{name}: {type(error).__name__}: {error}")

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
            table.write_text(record.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60))
        except Exception:
            for path in (trace, table, copy):
                with suppress(OSError):
                    path.unlink()
            raise
