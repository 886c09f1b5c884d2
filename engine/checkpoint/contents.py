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

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Run, fingerprint
from engine import world, zero
from engine.archive import State, read_state
from engine.checkpoint.pieces import MAIN, MASTER, MOMENTS, WHOLE, Piece, Pieces, label
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


def state_of(step: int, kept: Kept, config: Run, consumed: Consumed = NOTHING) -> State:
    """What a checkpoint of now knows besides its pieces. `step` is how many are finished."""
    trainable = (item for item in kept.engines[MAIN].module.named_parameters() if item[1].requires_grad)
    shapes = {name: list(zero.full_shape(parameter)) for name, parameter in trainable}
    steps = {name: zero.steps_taken(engine) for name, engine in kept.engines.items()}
    return State(step, steps, world.world_size(), fingerprint(config), shapes, **asdict(consumed))


def load(path: Path, kept: Kept) -> tuple[State, dict[str, Tensor]]:
    """Restores this rank's share of engines and followers; gives the state and what Kept.whole was."""
    state, found = read_state(path), Pieces(path)
    for name, engine in kept.engines.items():
        _restore(name, engine, state.optimizer_steps.get(name, 0), found)
    for follower in kept.followers:
        follower.restore(found)
    return state, {name: found.read(WHOLE, name) for name in found.names(WHOLE)}


def _restore(name: str, engine: Any, steps: int, found: Pieces) -> None:
    zero.make_moments(engine, steps)
    for fragment in zero.fragments(engine):
        for key in (MASTER, *MOMENTS) if steps else (MASTER,):
            fragment.write(key, found.read(key, label(name, fragment.name), fragment.start, fragment.numel))
    zero.publish(engine)
