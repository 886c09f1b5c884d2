"""Durable files: written atomically, appended to through a full disk, and corpus directories published whole.

    write_atomic(run_dir / "config.yaml", to_yaml(config))   # OSError: the old config.yaml is unchanged

    log = AppendOnlyFile(run_dir / "log.jsonl")
    log.append('{"step": 10}')              # raises no OSError
    log.trouble                             # "runs/demo/log.jsonl: No space left on device", or "" where all is written
    log.flush()                             # tries again, as every append does

    if not is_published(out, arguments):
        with staged_directory(out) as directory:
            ...                                     # write shards into `directory`
            write_manifest(directory, arguments, {"train-000000.tar": 256})

A corpus is written to DIR/.partial and moved into place by renames once it is complete, manifest.json last. The
manifest records the arguments, so that the same command recognises its corpus and does nothing, and another command
does not mix its shards into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from configs import UserError

_MAX_LINES = 1000  # in one write
MANIFEST = "manifest.json"
PARTIAL = ".partial"


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


def is_published(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` already holds the corpus of these arguments; False where `out` is empty or absent.

    Raises UserError where it holds anything else, or a corpus with a shard missing or cut short.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: a corpus is a directory; choose another --out")
    present = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.exists() else []
    if not present:
        return False
    if MANIFEST not in present:
        shown = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
        raise UserError(
            f"--out {out} already holds {len(present)} entries ({shown}) and no {MANIFEST} of this program: "
            "shards are never mixed with other files; choose another --out or empty it"
        )
    manifest = _read_manifest(out / MANIFEST)
    if manifest.get("arguments") != arguments:
        raise UserError(
            f"--out {out} already holds another corpus ({_difference(manifest['arguments'], arguments)}): "
            "choose another --out or delete that directory"
        )
    for name, shard in manifest["shards"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != shard["bytes"]:
            raise UserError(f"--out {out}: {name} is missing or cut short; delete that directory and run again")
    return True


def write_manifest(directory: Path, arguments: dict[str, Any], samples: dict[str, int], **notes: Any) -> None:
    """Write manifest.json: arguments, notes for readers, and the number of samples and bytes of each shard."""
    shards = {name: {"samples": n, "bytes": (directory / name).stat().st_size} for name, n in samples.items()}
    write_json(directory / MANIFEST, {"arguments": arguments, **notes, "shards": shards})


def write_json(path: Path, content: object) -> None:
    """Write indented UTF-8 JSON; bytes of file names that are no text become question marks."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to write to. Its files move into `out` when the block succeeds, else they are deleted."""
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        partial = out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir()
        try:
            yield partial
            for path in sorted(partial.iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
                path.replace(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of a directory, so that two runs cannot delete each other's files. Raises UserError."""
    path = out / ".lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out} is being written by another run: wait for it or choose another --out"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"arguments": manifest["arguments"], "shards": dict(manifest["shards"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a manifest of this program: choose another --out or empty it") from None


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """List every argument that differs: 'seed: 0 there, 1 requested'. `content` is a hash: its values mean nothing."""
    found = found if isinstance(found, dict) else {}
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    return ", ".join(
        "images, captions or options have changed since it was written"
        if key == "content" and found.get("kind") == wanted.get("kind")
        else f"{key}: {found.get(key)} there, {wanted.get(key)} requested"
        for key in keys
    )
