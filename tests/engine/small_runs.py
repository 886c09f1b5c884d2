"""A corpus and a command line for small runs that a launcher starts, and checkpoints without weights.

shards = write_shards(folder / "shards")
[sys.executable, LAUNCH, *arguments(shards, run_dir), "optim.steps=60"]
write_checkpoint(run_dir / "checkpoints", config, step=3)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs import RunConfig, fingerprint, to_yaml
from data import corpus
from engine import launch
from engine.checkpoint.directory import LATEST, SUMS, checkpoint_name, checksum_line
from engine.checkpoint.reading import CheckpointState
from model.weights import read_weights

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "engine" / "launch.py"
WAIT_SECONDS = 300  # a guard, far above what any of these takes


def write_shards(out: Path) -> Path:
    """120 small scenes in six shards, with their vocabulary."""
    asked = ["synthetic", "--out", str(out), "--samples", "120", "--held-out", "12", "--size", "32"]
    assert corpus.main([*asked, "--shard-size", "20"]) == 0
    return out


def arguments(shards: Path, run_dir: Path) -> list[str]:
    """What follows `engine/launch.py` for a run that reports every other step."""
    return [
        f"--config={ROOT / 'tests/tiny.yaml'}", f"data.train=[{shards}/train-*.tar]",
        f"data.held_out=[{shards}/held_out-*.tar]", f"data.tokenizer={shards}/tokenizer.json",
        "model.text.vocab=2048", "model.text.context=32", f"system.run_dir={run_dir}", "system.report_every=2",
    ]  # fmt: skip


def write_checkpoint(root: Path, config: RunConfig, step: int = 3, **state: Any) -> Path:
    """Write a checkpoint as far as a start reads it before its weights; `state` are further fields of State."""
    path = root / checkpoint_name(step)
    path.mkdir(parents=True)
    (root / LATEST).write_text(path.name)
    (path / "config.yaml").write_text(to_yaml(config))
    fields = {"optimizer_steps": {"model": step}, "world_size": 1, "shapes": {}} | state
    (path / "state.json").write_text(
        json.dumps(asdict(CheckpointState(step=step, fingerprint=fingerprint(config), **fields)))
    )
    (path / SUMS).write_text("".join(checksum_line(path / name) for name in ("config.yaml", "state.json")))
    return path


def launch_here(arguments: list[str]) -> int:
    """One rank, in a process that a launcher's variables are set in; for run_ranks with join=False."""
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]
    return launch.main(arguments)


def reported(run_dir: Path) -> list[int]:
    """The steps of the reports so far."""
    log = run_dir / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(holds: Callable[[], Any], what: str, why: Callable[[], str]) -> None:
    """Returns once `holds()`; fails the test with `why()` when it does not come."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen in {WAIT_SECONDS} s: {why()[-4000:]}"
        time.sleep(0.02)


def differing_weights(one: Path, other: Path) -> list[str]:
    """Names of the weights in which two finished runs differ by a bit; all names must be those of both."""
    mine, theirs = (read_weights(run_dir / "weights.safetensors")[0] for run_dir in (one, other))
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]
