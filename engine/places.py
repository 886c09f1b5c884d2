"""Where a run writes. Imports no torch: a start asks before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from configs import RunConfig


def run_directory(config: RunConfig) -> Path:
    """system.run_dir, or runs/NAME below the working directory."""
    return Path(config.system.run_dir or f"runs/{config.name}")


def checkpoints(config: RunConfig) -> Path:
    """The directory of its checkpoints."""
    return run_directory(config) / "checkpoints"
