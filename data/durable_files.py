"""Durable files: written atomically, or appended to through a full disk. Standard library alone.

write_atomic(run_dir / "config.yaml", to_yaml(config))   # OSError: the old config.yaml is unchanged

log = AppendOnlyFile(run_dir / "log.jsonl")
log.append('{"step": 10}')              # raises no OSError
log.trouble                             # "runs/demo/log.jsonl: No space left on device", or "" where all is written
log.flush()                             # tries again, as every append does
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path

_MAX_LINES = 1000  # in one write


def write_atomic(path: Path, content: str | bytes, is_synced: bool = True) -> None:
    """Write a temporary file beside `path` and rename it: readers see the old content or the new, never a part.

    Text is UTF-8. On disk when this returns, unless `is_synced` is False. Raises OSError, and leaves no temporary file.
    Several threads and processes may write one file: one of them wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if is_synced:
            fsync_path(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendOnlyFile:
    """A text file that lines are appended to; those that cannot be written wait in memory, in order. Thread-safe.

    The directory is created where it is missing. What a disk that fills up accepts of a line stays in the file, and the
    whole line is written again on a line of its own: a reader that skips broken lines, such as one of JSON lines, loses
    none and reads none twice. (Where a network file system reports a failure only on close, one may come twice.)
    Several processes may append to one file: a line is one write at its end. `trouble` is the last write's error, with
    the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def append(self, *lines: str) -> None:
        """Write lines, given without their line ends, after those that still wait."""
        with self._lock:
            self._waiting.extend(f"{line}\n".encode(errors="backslashreplace") for line in lines)
        self.flush()

    def flush(self) -> None:
        """Try to write the waiting lines."""
        with self._lock:
            tries = 2  # a disk that took part of a line reports the reason at the second
            try:
                while self._waiting and tries:
                    tries -= not self._write()
            except OSError as error:
                self.trouble = f"{self.path}: {error.strerror or error}"
            else:
                self.trouble = f"{self.path}: a line was cut short" if self._waiting else ""

    def _write(self) -> bool:
        """Write waiting lines; return whether the file took all of them. Raises OSError."""
        lines = list(islice(self._waiting, _MAX_LINES))
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
    """Whether this or a killed process has left half a line at the end."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
