"""Whether a rank is lost, from what ranks have said of themselves and when. No clock, no network: a pure rule.

judge = Judge(world_size=8, silent_seconds=60, stuck_seconds=1800, now=0.0)
judge.heard(Beat(rank=3, host="b", step=120, phase="backward"), now=1.0)
judge.closed(3)
judge.verdict(now=2.0)          # Verdict(kind="dead", ranks=(3,), ...)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from engine.exits import LOST_RANK

# Phases in which a rank waits for others (engine/report/timing.py, engine/run.py): one that is elsewhere is waited for.
WAITING = ("all_gather", "reduce_scatter", "all_reduce", "backward", "optimizer", "report", "barrier")


@dataclass(frozen=True)
class Beat:
    """Where a rank is. `step` counts those it has finished."""

    rank: int
    host: str
    step: int
    phase: str


@dataclass(frozen=True)
class Verdict:
    """`beat` is the last word of the first of `ranks`."""

    kind: str  # dead, silent, stuck, failed
    ranks: tuple[int, ...]
    beat: Beat
    message: str
    code: int = LOST_RANK  # with which the others end


class Judge:
    """Of one run. Ranks that have said goodbye are not judged."""

    def __init__(self, world_size: int, silent_seconds: float, stuck_seconds: float, now: float) -> None:
        self._silent, self._stuck = silent_seconds, stuck_seconds
        self._beats = {rank: Beat(rank, "?", 0, "starting") for rank in range(world_size)}
        self._heard = dict.fromkeys(range(world_size), now)
        # When a rank last was elsewhere than before: in another phase, or after another step, lower ones included.
        self._advanced = now
        self._present = set(range(world_size))
        self._closed: list[int] = []

    def heard(self, beat: Beat, now: float) -> None:
        """A rank's word, at `now` in seconds; one that differs from its last is progress of the run."""
        if beat != self._beats[beat.rank]:
            self._advanced = now
        self._beats[beat.rank], self._heard[beat.rank] = beat, now

    def closed(self, rank: int) -> None:
        """The rank's connection has ended, without a goodbye."""
        if rank in self._present:
            self._closed.append(rank)

    def goodbye(self, rank: int) -> None:
        """The rank ends on purpose: from here on it is not judged."""
        self._present.discard(rank)

    def beat_of(self, rank: int) -> Beat:
        """The rank's last word; before its first, step 0 in "starting" on host "?"."""
        return self._beats[rank]

    def verdict(self, now: float) -> Verdict | None:
        """What is wrong, if something is: first who has died, then who is silent, then what does not move."""
        if self._closed:
            return self._of("dead", tuple(self._closed), "its process has ended without a word")
        silent = [rank for rank in sorted(self._present) if now - self._heard[rank] > self._silent]
        if silent:
            return self._of("silent", tuple(silent), f"not heard of for {self._silent:g} s: stopped, or cut off")
        if self._present and now - self._advanced > self._stuck:
            return self._of("stuck", self._suspects(), f"no rank has ended a step or a phase for {self._stuck:g} s")
        return None

    def _suspects(self) -> tuple[int, ...]:
        """Those that are furthest behind; among them those that do not wait for others, if there are any."""
        last = min(self._beats[rank].step for rank in self._present)
        behind = sorted(rank for rank in self._present if self._beats[rank].step == last)
        busy = [rank for rank in behind if self._beats[rank].phase not in WAITING]
        return tuple(busy or behind)

    def _of(self, kind: str, ranks: tuple[int, ...], what: str) -> Verdict:
        others = self._places(self._present - set(ranks))
        where = f"{self._places(set(ranks))}: {what}"
        return Verdict(kind, ranks, self._beats[ranks[0]], f"{kind}: {where}{f'; others: {others}' if others else ''}")

    def _places(self, ranks: set[int]) -> str:
        """ "rank 3 (host b) after step 120 in backward, ranks 0 1 2 (host a) after step 121 in all_reduce" """
        places = defaultdict(list)
        for rank in sorted(ranks):
            places[replace(self._beats[rank], rank=0)].append(str(rank))
        return ", ".join(
            f"{'rank' if len(numbers) == 1 else 'ranks'} {' '.join(numbers)} (host {at.host}) after step {at.step} "
            f"in {at.phase}"
            for at, numbers in places.items()
        )
