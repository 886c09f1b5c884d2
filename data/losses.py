"""What storage did not give: which samples are skipped from which position on, and when it is time to stop.

A picture that cannot be decoded is bad for ever. A shard that cannot be read is lost for now: it is skipped for the
rest of its epoch, in which one stream of one rank reads it, and tried again in the next. So the sequence is a pure
function of the corpus and of these losses, whatever the number of ranks; and a shard costs one row of tries an epoch.

    losses = Losses(shard_sizes, health)
    losses.add(Place(epoch=0, shard_idx=3, sample_idx=17), 4711, Unreadable("vanished shard", is_whole_shard=True))
    losses.holds(Place(epoch=0, shard_idx=3, sample_idx=5), 4720)      # True: so is the rest of the shard
    losses.holds(Place(epoch=1, shard_idx=3, sample_idx=5), 9000)      # False: another epoch, another try

One sample that storage refuses may be a bad sector: the shard is given up at the second.
"""

from __future__ import annotations

import threading
from collections import Counter

from data.health import BadSample, Health
from data.loss_log import Loss, LossLog
from data.order import Ints, Place
from data.patience import Unreadable

WHOLE = -1  # in place of a sample's number: all of the shard
_MOST_IN_A_ROW = 8  # shards lost with nothing read in between: it is not the shards
_MOST_SAMPLES = 1  # refused in a shard before it counts as lost


class StorageFails(OSError):
    """Storage gives next to nothing: no mistake of the user's, and worth a restart."""


class Losses:
    """The losses of one rank. Thread-safe. `health` counts every sample skipped, and a lost shard by its size; `log`
    keeps them for a run that goes on."""

    def __init__(self, shard_sizes: Ints, health: Health, log: LossLog | None = None) -> None:
        self._sizes, self._health, self._log = shard_sizes, health, log
        self._by_place: dict[tuple[int, int, int], Loss] = {}  # (epoch, shard, sample or WHOLE)
        self._refused: Counter[tuple[int, int]] = Counter()  # samples that storage refused, by (epoch, shard)
        self._counted: set[tuple[int, int]] = set()  # (shard, sample or WHOLE) that health knows
        self._num_in_a_row = 0
        self._lock = threading.Lock()

    def holds(self, place: Place, position: int) -> bool:
        """Whether a sample is skipped at a position."""
        shard = (place.epoch, place.shard_idx)
        lost = (self._by_place.get((*shard, WHOLE)), self._by_place.get((*shard, place.sample_idx)))
        return any(loss is not None and loss.position <= position for loss in lost)

    def add(self, place: Place, position: int, error: Unreadable) -> None:
        """Notes that a sample cannot be read from `position` on, the first one of a batch.

        Raises StorageFails when it is one shard too many in a row.
        """
        with self._lock:
            shard = (place.epoch, place.shard_idx)
            self._refused[shard] += error.is_waited_for
            is_whole = error.is_whole_shard or self._refused[shard] > _MOST_SAMPLES
            sample_idx = WHOLE if is_whole else place.sample_idx
            is_new = (*shard, sample_idx) not in self._by_place  # threads may find out at once
            if is_new:
                loss = Loss(position, *shard, sample_idx, str(error))
                self._by_place[loss[1:4]] = loss
                self._count(place.shard_idx, sample_idx)
                if self._log is not None:
                    self._log.add(loss)
            self._num_in_a_row += is_whole and is_new
        if self._num_in_a_row >= _MOST_IN_A_ROW:
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            raise StorageFails(
                f"{self._num_in_a_row} shards in a row cannot be read ({why}; the last is shard "
                f"{place.shard_idx} at position {position}), each tried system.loader.tries times: storage does not "
                "answer; when it does again, go on with --resume"
            )

    def met(self, place: Place, key: str, position: int) -> None:
        """Names a sample that is skipped."""
        shard = (place.epoch, place.shard_idx)
        loss = self._by_place.get((*shard, place.sample_idx)) or self._by_place[(*shard, WHOLE)]
        self._health.met(BadSample(key, loss.reason, position))

    def storage_answered(self) -> None:
        """A sample was read: what failed before was not everything."""
        self._num_in_a_row = 0

    def begin(self, position: int) -> None:
        """Data is read from `position` on: losses before it stay, also those of earlier sessions and of all ranks."""
        past = self._log.begin(position) if self._log is not None else []
        with self._lock:
            self._by_place = {place: loss for place, loss in self._by_place.items() if loss.position < position}
            for loss in past:
                self._by_place.setdefault(loss[1:4], loss)
                self._count(loss.shard_idx, loss.sample_idx)

    def all(self) -> list[Loss]:
        """What has been lost, by position."""
        return sorted(self._by_place.values())

    def _count(self, shard_idx: int, sample_idx: int) -> None:
        if (shard_idx, sample_idx) not in self._counted:
            self._counted.add((shard_idx, sample_idx))
            self._health.lost(int(self._sizes[shard_idx]) if sample_idx == WHOLE else 1)
