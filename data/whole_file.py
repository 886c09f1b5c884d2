"""A file that is there whole or not at all: a draft beside it, renamed.

    write_whole(run_dir / "config.yaml", to_yaml(config))      # OSError: the old config.yaml is as it was

Whoever opens it meanwhile reads the old content or the new. Several processes may write one file: one of them wins.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, is_synced: bool = True) -> None:
    """Text is UTF-8. On disk when this returns, unless `is_synced` is False. Raises OSError, and leaves no draft."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        if is_synced:
            sync(draft)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def sync(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
