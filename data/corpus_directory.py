"""Corpus directories, published whole: staged, moved into place by renames, recognised by a manifest.

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
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial"


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
