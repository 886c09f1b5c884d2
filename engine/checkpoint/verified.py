"""The checkpoint that a run goes on from: the newest that is what was saved.

    path = newest_good(root, say=reporter.say)

Ranks share the reading: each holds its part of the files against SHA256SUMS, and what one finds damaged, none uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from configs import UserError
from engine import world
from engine.agreement import on_first, with_one_answer
from engine.checkpoint import directory


def newest_good(root: Path, say: Callable[[str], None]) -> Path:
    """`latest`, or where that is damaged the one before it, and so on; `say` hears of every one passed over.

    A collective. Raises UserError where none is good.
    """
    candidates, latest = on_first(lambda: (directory.candidates(root), directory.read_latest(root)))
    troubles = (
        [] if latest is None or latest in candidates else [f"{latest} is not complete (it has no {directory.SUMS})"]
    )
    for trouble in troubles:
        say(f"passed over: {trouble}")
    for path in candidates:
        if not (trouble := _trouble_with(path)):
            return path
        troubles.append(trouble)
        say(f"passed over: {trouble}")
    raise UserError(
        f"--resume: {root} has no checkpoint that can be trusted ({'; '.join(troubles) or 'none is complete'}): bring "
        "one back from a copy, or start anew under another name"
    )


def _trouble_with(path: Path) -> str:
    """Why a checkpoint cannot be used, as one rank found; nothing where it can. A collective."""
    try:
        with_one_answer(lambda: _check_share(path))
    except UserError as error:
        return str(error)
    return ""


def _check_share(path: Path) -> None:
    names = sorted(directory.sums_of(path))
    directory.check(path, names[world.rank() :: world.world_size()])
