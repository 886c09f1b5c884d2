"""Save and resume: a directory that appears whole or not at all.

    checkpoints/step-00000300/   rank-00000.safetensors ... state.json config.yaml
    checkpoints/latest           "step-00000300"

Everything that evolves by itself is in the pieces: fp32 weights, AdamW moments, fp32 teacher averages, the centre of
the centring targets. Everything else is a function of the step (data cursor, view numbers, masks, schedules; the model
draws no random numbers), so `state.json` needs little more than that one integer. Loading at another world size or ZeRO
stage is the same code: each rank reads the ranges it now owns.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs import Config, fingerprint, to_yaml
from engine import world, zero
from engine.archive import State, read_state
from engine.pieces import CENTRE, MASTER, MOMENTS, TEACHER, Piece, Pieces, sync, write_pieces
from engine.teacher import Teacher
from model.objectives.total import Centres


def save(root: Path, step: int, engine: Any, teacher: Teacher | None, centres: Centres | None, config: Config) -> Path:
    """Writes `root/step-XXXXXXXX` on all ranks together: temporary directory, fsync, rename, then `latest`."""
    final = root / f"step-{step:08d}"
    draft = root / f".{final.name}.tmp"
    if world.is_first():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    world.barrier()
    pieces = _pieces(engine, teacher, centres if world.is_first() else None)
    write_pieces(draft / f"rank-{world.rank():05d}.safetensors", pieces)
    world.barrier()
    if world.is_first():
        _finish(draft, final, _state(step, engine, config), config)
    world.barrier()
    return final


def load(path: Path, engine: Any, teacher: Teacher | None) -> tuple[State, Centres | None]:
    """Restores this rank's share of weights, moments and teacher; gives the state and the centres."""
    state, pieces = read_state(path), Pieces(path)
    zero.make_moments(engine, state.optimizer_steps)
    for fragment in zero.fragments(engine):
        keys = (MASTER, *MOMENTS) if state.optimizer_steps else (MASTER,)
        for key in keys:
            fragment.write(key, pieces.read(key, fragment.name, fragment.start, fragment.numel))
    zero.publish(engine)
    if teacher is not None:
        teacher.restore({p.name: pieces.read(TEACHER, p.name, p.start, p.average.numel()) for p in teacher.pairs})
    centres = {name: pieces.read(CENTRE, name).to(engine.device) for name in pieces.names(CENTRE)}
    return state, Centres(**centres) if centres else None


def _pieces(engine: Any, teacher: Teacher | None, centres: Centres | None) -> list[Piece]:
    keys = (MASTER, *MOMENTS) if zero.steps_taken(engine) else (MASTER,)
    pieces = [
        Piece(key, fragment.name, fragment.start, fragment.read(key))
        for fragment in zero.fragments(engine)
        for key in keys
    ]
    pieces += [
        Piece(TEACHER, pair.name, pair.start, pair.average)
        for pair in (teacher.pairs if teacher else ())
        if zero.is_partitioned(pair.teacher) or world.is_first()  # ZeRO-1, 2: whole on every rank, written once
    ]
    return pieces + [Piece(CENTRE, name, 0, centre) for name, centre in (vars(centres) if centres else {}).items()]


def _state(step: int, engine: Any, config: Config) -> State:
    trainable = (item for item in engine.module.named_parameters() if item[1].requires_grad)
    shapes = {name: list(zero.full_shape(parameter)) for name, parameter in trainable}
    return State(step, zero.steps_taken(engine), world.world_size(), fingerprint(config), shapes)


def _finish(draft: Path, final: Path, state: State, config: Config) -> None:
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
