"""A file of lines that only grows, written through a full disk or a directory that fails for a while.

    log = Lines(run_dir / "log.jsonl")
    log.append('{"step": 10}')              # raises no OSError
    log.trouble                             # "runs/demo/log.jsonl: No space left on device", or "" where all is written
    log.flush()                             # tries again, as every append does

A line that cannot be written waits in memory, in order. What a disk that fills up takes of a line stays in the file,
and the whole line comes again on a line of its own. So a reader that passes over broken lines, as those of JSON do,
loses none and meets none twice. (Where a network file system reports a failure only as the file is closed, one may come
twice.)

Several processes may append to one file: a line is one write at its end.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from itertools import islice
from pathlib import Path

_MOST_AT_ONCE = 1000  # lines in a write


class Lines:
    """The lines of one process in the file at `path`; its directory is made where it is missing. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""  # what the last try met, with the path
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def append(self, *lines: str) -> None:
        """Writes the lines, each without its end; what was not written before comes before them."""
        with self._lock:
            self._waiting.extend(f"{line}\n".encode(errors="backslashreplace") for line in lines)
        self.flush()

    def flush(self) -> None:
        """Tries to write what waits."""
        with self._lock:
            tries = 2  # a disk that took a part of a line says at the second why
            try:
                while self._waiting and tries:
                    tries -= not self._write()
            except OSError as error:
                self.trouble = f"{self.path}: {error.strerror or error}"
            else:
                self.trouble = f"{self.path}: a line was cut short" if self._waiting else ""

    def _write(self) -> bool:
        """Writes lines that wait; whether the file took all of them. Raises OSError."""
        lines = list(islice(self._waiting, _MOST_AT_ONCE))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            before = b"\n" if _ends_inside_a_line(descriptor) else b""
            left = os.write(descriptor, before + b"".join(lines)) - len(before)
        finally:
            os.close(descriptor)
        for line in lines:
            if left < len(line) - 1:  # a line without its end is whole: the next write begins with it
                return False
            left -= len(line)
            self._waiting.popleft()
        return True


def _ends_inside_a_line(descriptor: int) -> bool:
    """Whether somebody, this process or a killed one, has left half a line."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
