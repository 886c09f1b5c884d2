"""Save and resume: a directory that appears whole or not at all.

    checkpoints/step-00000300/   rank-00000.safetensors ... state.json config.yaml
    checkpoints/latest           "step-00000300"

Everything that evolves by itself is in the pieces (Kept): fp32 weights and AdamW moments of every engine, fp32 running
averages, small tensors that all ranks share. Everything else is a function of the step (data cursor, view numbers,
masks, schedules; models draw no random numbers), so `state.json` needs little more than that one integer. Loading at
another world size or ZeRO stage is the same code: each rank reads the ranges it now owns.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Run, fingerprint, to_yaml
from engine import world, zero
from engine.archive import State, read_state
from engine.pieces import MAIN, MASTER, MOMENTS, WHOLE, Piece, Pieces, label, sync, write_pieces
from engine.training import Kept


def save(root: Path, step: int, kept: Kept, config: Run) -> Path:
    """Writes `root/step-XXXXXXXX` on all ranks together: temporary directory, fsync, rename, then `latest`."""
    final = root / f"step-{step:08d}"
    draft = root / f".{final.name}.tmp"
    if world.is_first():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    world.barrier()
    write_pieces(draft / f"rank-{world.rank():05d}.safetensors", _pieces(kept))
    world.barrier()
    if world.is_first():
        _finish(draft, final, _state(step, kept, config), config)
    world.barrier()
    return final


def load(path: Path, kept: Kept) -> tuple[State, dict[str, Tensor]]:
    """Restores this rank's share of engines and followers; gives the state and what Kept.whole was."""
    state, pieces = read_state(path), Pieces(path)
    for name, engine in kept.engines.items():
        _restore(name, engine, state.optimizer_steps.get(name, 0), pieces)
    for follower in kept.followers:
        follower.restore(pieces)
    return state, {name: pieces.read(WHOLE, name) for name in pieces.names(WHOLE)}


def _restore(name: str, engine: Any, steps: int, pieces: Pieces) -> None:
    zero.make_moments(engine, steps)
    for fragment in zero.fragments(engine):
        for key in (MASTER, *MOMENTS) if steps else (MASTER,):
            fragment.write(key, pieces.read(key, label(name, fragment.name), fragment.start, fragment.numel))
    zero.publish(engine)


def _pieces(kept: Kept) -> list[Piece]:
    pieces = []
    for name, engine in kept.engines.items():
        keys = (MASTER, *MOMENTS) if zero.steps_taken(engine) else (MASTER,)
        pieces += [
            Piece(key, label(name, fragment.name), fragment.start, fragment.read(key))
            for fragment in zero.fragments(engine)
            for key in keys
        ]
    for follower in kept.followers:
        pieces += follower.pieces()
    return pieces + [Piece(WHOLE, name, 0, tensor.flatten()) for name, tensor in kept.whole.items() if world.is_first()]


def _state(step: int, kept: Kept, config: Run) -> State:
    trainable = (item for item in kept.engines[MAIN].module.named_parameters() if item[1].requires_grad)
    shapes = {name: list(zero.full_shape(parameter)) for name, parameter in trainable}
    steps = {name: zero.steps_taken(engine) for name, engine in kept.engines.items()}
    return State(step, steps, world.world_size(), fingerprint(config), shapes)


def _finish(draft: Path, final: Path, state: State, config: Run) -> None:
    (draft / "config.yaml").write_text(to_yaml(config))
    (draft / "state.json").write_text(json.dumps(asdict(state)))
    for name in ("config.yaml", "state.json"):
        sync(draft / name)
    sync(draft)
    if final.exists():  # the same step saved again after a resume
        shutil.rmtree(final)
    draft.rename(final)
    pointer = final.parent / "latest"
    pending = pointer.with_name(".latest.tmp")
    pending.write_text(final.name)
    sync(pending)
    pending.replace(pointer)
    sync(final.parent)
