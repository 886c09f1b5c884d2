"""Where reports go: TensorBoard, log.jsonl and log.txt, a bar or lines on a terminal. TensorBoard's one door.

    log = Log(Path("runs/demo"), total_steps=300)
    log.scalars(10, {"loss/total": 7.1})        # into runs/demo/log.jsonl and log.txt
    [file.trouble for file in log.files]        # ["", ""]: both could be written

No sink raises OSError: what a file cannot take waits in memory, and what a terminal cannot show is lost.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from data.durable_files import AppendOnlyFile

_VERSION = "brain.Event:2"  # content of the first record of a file


HEADLINE = {
    "loss/total": "loss",
    "loss/clip": "clip",
    "loss/ssl": "ssl",
    "loss/rec": "rec",
    "loss/gan": "gan",
    "loss/disc": "disc",
    "speed/samples_per_second": "samples/s",
    "speed/mfu": "MFU",
}


class GrowingFile(Protocol):
    """A file that keeps what it cannot write for later (data/durable_files.py, engine/reporting/sinks.py)."""

    path: Path
    trouble: str  # why the last write failed, with the path; "" where all is written

    def flush(self) -> None:
        """Try to write what waits. Raises no OSError."""
        ...


class Sink(Protocol):
    """One destination of reports."""

    @property
    def files(self) -> Sequence[GrowingFile]:
        """Files it writes to."""
        ...

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Take one report: figures by name, after `step` steps."""
        ...

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Take a (3, height, width) image of step `step`. A sink without images ignores it."""
        ...

    def message(self, text: str) -> None:
        """Take a line for a person, between reports."""
        ...

    def close(self) -> None:
        """Write the lines still waiting, as far as the disk takes them."""
        ...


class EventFile:
    """A file of TensorBoard's records in `directory` that survives a full disk; both are created by the first `flush`.

        events = EventFile(run_dir / "tensorboard")
        events.scalars(10, {"loss/total": 7.1})
        events.image(10, "latents", image)              # (3, height, width) in [0, 1]
        events.flush()                                  # on disk, or `events.trouble` says why not

    torch's SummaryWriter writes in a thread of its own that dies of the first error: a record cut short ends the file
    for TensorBoard, every later call raises, and closing does too. Here what cannot be written waits in memory, and the
    next try writes it where the file was last whole, over what the failed one left. One process writes the file.
    """

    def __init__(self, directory: Path) -> None:
        unique = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = directory / f"events.out.tfevents.{unique}"
        self.trouble = ""  # why the last write failed, with the path
        self._num_written = 0  # bytes of whole records
        self._waiting = io.BytesIO()
        self._records = RecordWriter(self._waiting)
        self._add(Event(file_version=_VERSION))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add figures by name, after `step` steps."""
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Add a (3, H, W) image in [0, 1] of step `step`."""
        self._add(Event(step=step, summary=summary.image(name, image, dataformats="CHW")))

    def text(self, name: str, text: str) -> None:
        """Add a line of text."""
        self._add(Event(summary=summary.text(name, text)))

    def flush(self) -> None:
        """Try to write what waits. Raises no OSError."""
        records = self._waiting.getvalue()
        if not records:
            return
        try:
            self._write(records)
        except OSError as error:
            self.trouble = f"{self.path}: {error.strerror or error}"
            return
        self.trouble = ""
        self._num_written += len(records)
        self._waiting.seek(0)
        self._waiting.truncate()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def _write(self, records: bytes) -> None:
        """Write at the end of the whole records. Raises OSError, also one that only closing the file shows."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            written = os.pwrite(descriptor, records, self._num_written)
        finally:
            os.close(descriptor)
        if written < len(records):
            raise OSError(f"{written} of {len(records)} bytes were written")


class TensorBoard:
    """Write every scalar and image for `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path) -> None:
        self._events = EventFile(run_dir / "tensorboard")
        self.files = (self._events,)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._events.scalars(step, values)
        self._events.flush()

    def image(self, step: int, name: str, image: Tensor) -> None:
        self._events.image(step, name, image)
        self._events.flush()

    def message(self, text: str) -> None:
        self._events.text("log", text)
        self._events.flush()

    def close(self) -> None:
        self._events.flush()


class LogFiles:
    """Write `log.jsonl`, every number of every report, and `log.txt`, one plain line each for a person."""

    def __init__(self, run_dir: Path, total_steps: int) -> None:
        self._json, self._text = AppendOnlyFile(run_dir / "log.jsonl"), AppendOnlyFile(run_dir / "log.txt")
        self.files = (self._json, self._text)
        self._total_steps = total_steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append a line to either file; log.jsonl also has the step and `time`, in seconds since 1970."""
        self._json.append(json.dumps({"step": step, "time": round(time.time(), 3), **values}))
        self._text.append(plain_line(step, self._total_steps, values))

    def image(self, step: int, name: str, image: Tensor) -> None:
        pass

    def message(self, text: str) -> None:
        """Append to log.txt."""
        self._text.append(text)

    def close(self) -> None:
        for file in self.files:
            file.flush()


class Terminal:
    """Show a bar with the time left on a terminal; print plain lines where the output is no terminal."""

    files: tuple[GrowingFile, ...] = ()

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._console = Console(stderr=False, highlight=False)
        self._total_steps = total_steps
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[headline]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, headline="")
            self._bar.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Move the bar, or print the plain line."""
        with suppress(OSError):
            if self._bar is None:
                print(plain_line(step, self._total_steps, values), flush=True)
            else:
                self._bar.update(self._task, completed=step, headline=headline(values))

    def image(self, step: int, name: str, image: Tensor) -> None:
        pass

    def message(self, text: str) -> None:
        """Print above the bar: no markup, no wrapping."""
        with suppress(OSError):
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar, if there is one."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


def headline(values: dict[str, float]) -> str:
    """Format the few numbers that a person watches."""
    return "  ".join(f"{label} {values[name]:.4g}" for name, label in HEADLINE.items() if name in values)


def plain_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    """Format one report as one line of text, with the time left."""
    left = format_duration(values.get("speed/seconds_left", math.nan))
    return f"step {step}/{total_steps}  {headline(values)}  left {left}"


def format_duration(seconds: float) -> str:
    """Format seconds as "05:30:00" or "12 d 05:30:00"; "?" where they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(int(seconds), 24 * 3600)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} d {clock}" if days else clock
