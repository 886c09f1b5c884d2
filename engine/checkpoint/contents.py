"""What a checkpoint holds of a run, and how it gets back.

    own = contents.pieces(kept)                        # this rank's share, views of what goes on changing
    state = contents.state_of(300, kept, config)
    state, whole = contents.load(path, kept)           # at any world size, under any ZeRO stage

Everything that evolves by itself is in the pieces (Kept): fp32 weights and AdamW moments of every engine, fp32 running
averages, small tensors that all ranks share. Everything else is a function of the step (data cursor, view numbers,
masks, schedules; models draw no random numbers), so `state.json` needs little more than that one integer, and which
samples were taken. Loading at
another world size or ZeRO stage is the same code: each rank reads the ranges it now owns.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import RunConfig, UserError, fingerprint
from engine import world, zero
from engine.archive import State, read_state
from engine.checkpoint.pieces import MAIN, MASTER, MOMENTS, WHOLE, Piece, Pieces, label
from engine.initial import part
from engine.training import Kept


def pieces(kept: Kept) -> list[Piece]:
    """This rank's share of the run, as it is now."""
    found = []
    for name, engine in kept.engines.items():
        keys = (MASTER, *MOMENTS) if zero.steps_taken(engine) else (MASTER,)
        found += [
            Piece(key, label(name, fragment.name), fragment.start, fragment.read(key))
            for fragment in zero.fragments(engine)
            for key in keys
        ]
    for follower in kept.followers:
        found += follower.pieces()
    return found + [Piece(WHOLE, name, 0, tensor.flatten()) for name, tensor in kept.whole.items() if world.is_first()]


@dataclass(frozen=True)
class Consumed:
    """What a run has taken of its data; fields as State's."""

    skipped_steps: int = 0
    samples_digest: str = ""
    corpus: dict[str, str] = field(default_factory=dict)
    position: int | None = None


NOTHING = Consumed()


def state_of(step: int, kept: Kept, config: RunConfig, consumed: Consumed = NOTHING) -> State:
    """What a checkpoint of now knows besides its pieces. `step` is how many are finished."""
    trainable = (item for item in kept.engines[MAIN].module.named_parameters() if item[1].requires_grad)
    shapes = {name: list(zero.full_shape(parameter)) for name, parameter in trainable}
    steps = {name: zero.steps_taken(engine) for name, engine in kept.engines.items()}
    return State(step, steps, world.world_size(), fingerprint(config), shapes, **asdict(consumed))


def load(path: Path, kept: Kept) -> tuple[State, dict[str, Tensor]]:
    """Restore this rank's shards of engines and followers; return the state and the tensors of Kept.whole.

    Raises UserError, on every rank and before anything is restored, where the weights are another model's.
    """
    state, found = read_state(path), Pieces(path)
    check_shapes(path, state, kept, found)
    for name, engine in kept.engines.items():
        _restore(name, engine, state.optimizer_steps.get(name, 0), found)
    for follower in kept.followers:
        follower.restore(found)
    return state, {name: found.read(WHOLE, name) for name in found.names(WHOLE)}


def check_shapes(path: Path, state: State, kept: Kept, found: Pieces) -> None:
    """Compare the shape of every trained parameter with the checkpoint's; raise UserError at the first difference.

    Without this check a range of a larger tensor would be read into a smaller one without an error. The checkpoint may
    hold more parameters only of a part that this run's model lacks, because an objective was switched off.
    """
    numels = {name: found.numel(MASTER, name) for name in found.names(MASTER)}
    own: dict[str, tuple[int, ...]] = {}
    for engine_name, engine in kept.engines.items():
        trained = (item for item in engine.module.named_parameters() if item[1].requires_grad)
        own |= {label(engine_name, name): tuple(zero.full_shape(parameter)) for name, parameter in trained}
    parts = {part(name) for name in own}
    for name in dict.fromkeys((*own, *state.shapes)):
        shape, saved = own.get(name), tuple(state.shapes[name]) if name in state.shapes else None
        if shape is None and part(name) not in parts:
            continue
        if saved == shape or (saved is None and numels.get(name) == math.prod(shape or ())):  # another engine's
            continue
        raise UserError(
            f"--resume: {name} is {saved or numels.get(name, 'not')} in {path} and {shape or 'not there'} in this run: "
            "these are another model's weights; restore the settings in its config.yaml, or start a new run under "
            "another name"
        )


def _restore(name: str, engine: Any, steps: int, found: Pieces) -> None:
    zero.make_moments(engine, steps)
    for fragment in zero.fragments(engine):
        for key in (MASTER, *MOMENTS) if steps else (MASTER,):
            fragment.write(key, found.read(key, label(name, fragment.name), fragment.start, fragment.numel))
    zero.publish(engine)
