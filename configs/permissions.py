"""Who may read a file that a library wrote: whoever the umask lets, as with any other file.

    save_file(tensors, path)
    follow_umask(path)          # 0600 -> 0644 under the usual umask 022

safetensors 0.8 gives its files the mode 0600: on a shared disk nobody else could evaluate a run, or go on with it.
"""

from __future__ import annotations

import os
from pathlib import Path


def follow_umask(path: Path | str) -> None:
    """Gives the file the mode that `open` would have given it."""
    mask = os.umask(0)
    os.umask(mask)  # it cannot be read without being set
    os.chmod(path, 0o666 & ~mask)
