"""The digest of all samples that made the weights, kept beside a run: added to every step, agreed on at reports.

log = SampleLog(cursor.samples_digest)
log.add(training.samples(batch))         # every step: integers of the host
log.read()                               # at reports, a collective: the same on every rank, at any world size
"""

from __future__ import annotations

from data.order import chain_digest
from engine import world


class SampleLog:
    """Goes on from `digest`."""

    def __init__(self, digest: str) -> None:
        self._digest, self._sums = digest, list[int]()

    def add(self, own_sum: int) -> None:
        """One more step, by this rank's share of it."""
        self._sums.append(own_sum)

    def read(self) -> str:
        """With all steps so far. A collective."""
        of_ranks = world.gather_objects(self._sums)
        self._digest, self._sums = chain_digest(self._digest, map(sum, zip(*of_ranks, strict=True))), []
        return self._digest
