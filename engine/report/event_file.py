"""TensorBoard's one door: an event file that outlasts a full disk.

    events = EventFile(run_dir / "tensorboard")
    events.scalars(10, {"loss/total": 7.1})
    events.picture(10, "latents", picture)          # (3, height, width) in [0, 1]
    events.flush()                                  # on disk, or `events.trouble` says why not

torch's SummaryWriter writes in a thread of its own that dies of the first error: a record cut short ends the file for
TensorBoard, every later call raises, and closing does too. Here what cannot be written waits in memory, and the next
try writes it at the place where the file was last whole, over what the failed one left. One process writes the file.
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

_VERSION = "brain.Event:2"  # what the first record of a file says


class EventFile:
    """A file of TensorBoard's records in `directory`, which is made with it; nothing is written before `flush`."""

    def __init__(self, directory: Path) -> None:
        unique = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = directory / f"events.out.tfevents.{unique}"
        self.trouble = ""  # what the last try met, with the path
        self._num_written = 0  # bytes of whole records
        self._waiting = io.BytesIO()
        self._records = RecordWriter(self._waiting)
        self._add(Event(file_version=_VERSION))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures by name, after `step` steps."""
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """A (3, H, W) picture in [0, 1], after `step` steps."""
        self._add(Event(step=step, summary=summary.image(name, picture, dataformats="CHW")))

    def text(self, name: str, text: str) -> None:
        """A line for a person."""
        self._add(Event(summary=summary.text(name, text)))

    def flush(self) -> None:
        """Tries to write what waits. Raises no OSError."""
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
        """Raises OSError, also where it is known only as the file is closed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            written = os.pwrite(descriptor, records, self._num_written)
        finally:
            os.close(descriptor)
        if written < len(records):
            raise OSError(f"{written} of {len(records)} bytes were written")
