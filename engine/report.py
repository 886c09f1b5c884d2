"""What a run tells: TensorBoard's one door, a JSON line and a plain line a report, a bar on a terminal.

Only the main rank writes; the others get a Reporter without sinks. A report is a step number and a flat dict of floats,
named with slashes as TensorBoard groups them ("loss/clip", "speed/samples_per_second").

    with open_reporter(Path("runs/demo"), total_steps=300, is_main=True) as reporter:
        reporter.scalars(10, {"loss/total": 7.1, "speed/samples_per_second": 55.0})
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

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


class Sink(Protocol):
    """Somewhere a report goes."""

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
        """Everything is written when this returns."""
        ...


class TensorBoard:
    """Every scalar and picture, for `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._writer.add_image(name, picture, step)

    def say(self, text: str) -> None:
        self._writer.add_text("log", text)

    def close(self) -> None:
        self._writer.close()


class Log:
    """`log.jsonl`, every number of every report; `log.txt`, one plain line for a person."""

    def __init__(self, run_dir: Path, total_steps: int) -> None:
        self._json = (run_dir / "log.jsonl").open("a", buffering=1)
        self._text = (run_dir / "log.txt").open("a", buffering=1)
        self._total_steps = total_steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._json.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._text.write(plain_line(step, self._total_steps, values) + "\n")

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def say(self, text: str) -> None:
        self._text.write(text + "\n")

    def close(self) -> None:
        self._json.close()
        self._text.close()


class Terminal:
    """A bar with the time left on a terminal; plain lines when the output goes elsewhere."""

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
        if self._bar is None:
            print(plain_line(step, self._total_steps, values), flush=True)
        else:
            self._bar.update(self._task, completed=step, headline=headline(values))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Reporter:
    """Hands each report to every sink."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One report; `step` counts finished steps."""
        for sink in self._sinks:
            sink.scalars(step, values)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """A (3, H, W) picture in [0, 1]."""
        for sink in self._sinks:
            sink.picture(step, name, picture)

    def say(self, text: str) -> None:
        """A sentence for the log and the terminal."""
        for sink in self._sinks:
            sink.say(text)


@contextmanager
def open_reporter(run_dir: Path, total_steps: int, first_step: int, is_main: bool) -> Iterator[Reporter]:
    """The Reporter of a rank; its files are closed and the bar is gone at the end."""
    sinks: list[Sink] = []
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        sinks = [TensorBoard(run_dir), Log(run_dir, total_steps), Terminal(total_steps, first_step)]
    try:
        yield Reporter(sinks)
    finally:
        for sink in sinks:
            sink.close()


def headline(values: dict[str, float]) -> str:
    """The few numbers a person watches."""
    return "  ".join(f"{label} {values[name]:.4g}" for name, label in HEADLINE.items() if name in values)


def plain_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    """One report as one line of text, with the time left."""
    left = (
        time.strftime("%H:%M:%S", time.gmtime(values["speed/seconds_left"])) if "speed/seconds_left" in values else "?"
    )
    return f"step {step}/{total_steps}  {headline(values)}  left {left}"
