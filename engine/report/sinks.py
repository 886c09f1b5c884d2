"""Where a report goes: TensorBoard, a JSON line and a plain line, a bar on a terminal.

    log = Log(Path("runs/demo"), total_steps=300)
    log.scalars(10, {"loss/total": 7.1})        # into runs/demo/log.jsonl and log.txt
    [file.trouble for file in log.files]        # ["", ""]: both could be written

No sink raises OSError: what a file cannot take waits in memory, and what a terminal cannot show is lost.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data.durable_files import AppendOnlyFile
from engine.report.event_file import EventFile

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
    """A file that keeps what it cannot write for later: AppendOnlyFile, and that of engine/report/event_file.py."""

    path: Path
    trouble: str  # what the last try to write met, with the path; "" where all is written

    def flush(self) -> None:
        """Tries to write what waits. Raises no OSError."""
        ...


class Sink(Protocol):
    """Somewhere a report goes."""

    @property
    def files(self) -> Sequence[GrowingFile]:
        """What it writes to."""
        ...

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One report: figures by name, after `step` steps."""
        ...

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """(3, height, width), as it was after `step` steps. A sink without pictures passes over it."""
        ...

    def say(self, text: str) -> None:
        """A line for a person, between reports."""
        ...

    def close(self) -> None:
        """Whatever can be written is, when this returns."""
        ...


class TensorBoard:
    """Every scalar and picture, for `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path) -> None:
        self._events = EventFile(run_dir / "tensorboard")
        self.files = (self._events,)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._events.scalars(step, values)
        self._events.flush()

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._events.picture(step, name, picture)
        self._events.flush()

    def say(self, text: str) -> None:
        self._events.text("log", text)
        self._events.flush()

    def close(self) -> None:
        self._events.flush()


class Log:
    """`log.jsonl`, every number of every report; `log.txt`, one plain line for a person."""

    def __init__(self, run_dir: Path, total_steps: int) -> None:
        self._json, self._text = AppendOnlyFile(run_dir / "log.jsonl"), AppendOnlyFile(run_dir / "log.txt")
        self.files = (self._json, self._text)
        self._total_steps = total_steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line in either file; log.jsonl also has the step and `time`, in seconds since 1970."""
        self._json.append(json.dumps({"step": step, "time": round(time.time(), 3), **values}))
        self._text.append(plain_line(step, self._total_steps, values))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def say(self, text: str) -> None:
        """Into log.txt."""
        self._text.append(text)

    def close(self) -> None:
        for file in self.files:
            file.flush()


class Terminal:
    """A bar with the time left on a terminal; plain lines when the output goes elsewhere, be it to a full disk."""

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
        """Moves the bar, or prints the plain line."""
        with suppress(OSError):
            if self._bar is None:
                print(plain_line(step, self._total_steps, values), flush=True)
            else:
                self._bar.update(self._task, completed=step, headline=headline(values))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def say(self, text: str) -> None:
        """Above the bar, as it is: no markup, no wrapping."""
        with suppress(OSError):
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the bar, if there is one."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


def headline(values: dict[str, float]) -> str:
    """The few numbers a person watches."""
    return "  ".join(f"{label} {values[name]:.4g}" for name, label in HEADLINE.items() if name in values)


def plain_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    """One report as one line of text, with the time left."""
    return f"step {step}/{total_steps}  {headline(values)}  left {span(values.get('speed/seconds_left', math.nan))}"


def span(seconds: float) -> str:
    """ "05:30:00", "12 d 05:30:00"; "?" for what is no number or has no end."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(int(seconds), 24 * 3600)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} d {clock}" if days else clock
