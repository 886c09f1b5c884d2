"""Bad and unreadable samples: counted by reason, logged once, skipped from then on; too many stop the run.

    tracker = BadSampleTracker(max_bad_share=0.02, corpus_size=1000, left_out=Counter({"missing caption": 3}), log=None)
    tracker.record(BadSample("00000/000000123", "truncated image", position=4711))
    tracker.counts                                   # {"missing caption": 3, "truncated image": 1}

A bad sample is no reason to stop a run of weeks; a corpus that is mostly bad is. The share is that of the whole corpus
as far as it is known: samples that the index left out count from the start, those that only reading shows by their
share of the positions served, and unreadable ones by their number: a lost shard is many positions in a row, and says
nothing about the other shards.

An image that cannot be decoded is bad for ever. A shard that cannot be read is unreadable for now: it is skipped for
the rest of its epoch, in which one stream of one rank reads it, and tried again in the next. So the sequence is a pure
function of the corpus and of these records, whatever the number of ranks; and a shard costs one row of tries an epoch.

    unreadable = UnreadableShards(shard_sizes, tracker)
    unreadable.add(SampleLocation(0, 3, 17), position=4711, error=Unreadable("vanished shard", is_whole_shard=True))
    unreadable.is_skipped(SampleLocation(0, 3, 5), position=4720)      # True: a sample of the same shard
    unreadable.is_skipped(SampleLocation(1, 3, 5), position=9000)      # False: another epoch, another try

One unreadable sample may be a bad sector: the whole shard is skipped from the second on.

A resumed run skips what it skipped before, by its log:

    runs/NAME/lost_shards.jsonl    {"session": 1, "start": 0}
                                   {"session": 1, "loss": [4711, 0, 3, -1, "vanished shard"]}
                                   {"session": 2, "start": 4800}

A session is one iteration over the data, from a position on. Records of earlier sessions count up to the position where
the next one started: later ones were discarded with their steps, and are tried again. All ranks append to one file; the
session numbers order their lines.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs import UserError
from data.durable_files import AppendOnlyFile
from data.order import Ints, SampleLocation
from data.storage import Unreadable

_MIN_BAD = 16  # bad samples served before their share counts: so many are no accident below the limit
WHOLE_SHARD = -1  # in place of a sample's number: all of the shard
_MAX_SHARDS_IN_A_ROW = 8  # unreadable shards without a readable sample in between: storage fails, not the shards
_MAX_SAMPLES = 1  # unreadable samples in a shard before all of it is skipped


class TooManyBadSamples(UserError):
    """The share of bad samples is above data.max_bad_share; `counts` holds them by reason."""

    def __init__(self, message: str, counts: Counter[str]) -> None:
        super().__init__(message)
        self.counts = counts


class StorageError(OSError):
    """Storage gives next to nothing: no mistake of the user's, and worth a restart."""


@dataclass(frozen=True)
class BadSample:
    """One sample that was not served, and why."""

    key: str  # "shard/sample"
    reason: str
    position: int | None  # global position at which it was met; None: left out by the index


class BadSampleTracker:
    """The bad samples of one process. Thread-safe.

    `corpus_size` counts the samples the index kept and `left_out` those it did not. `log` (jsonl) gets each
    bad sample once, over resumed runs and over ranks that share the file too; `file` is that file. `hint` returns
    the end of the error message for the counts.
    """

    def __init__(
        self,
        max_bad_share: float,
        corpus_size: int,
        left_out: Counter[str],
        log: Path | None,
        hint: Callable[[Counter[str]], str] | None = None,
    ) -> None:
        self.max_bad_share, self.corpus_size, self.left_out = max_bad_share, corpus_size, left_out
        self.file = None if log is None else AppendOnlyFile(log)
        self._hint = hint
        self._served: Counter[str] = Counter()
        self._known: set[str] = set()
        self._num_positions = self._num_bad_positions = self._num_unreadable = 0
        self._logged: set[tuple[str, str]] = set()
        self._read_bytes = 0
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counter[str]:
        """Distinct bad samples by reason, those left out by the index included."""
        return self.left_out + self._served

    @property
    def share(self) -> float:
        """The bad share of the corpus: exact for what the index shows, by positions served for the rest."""
        num_left_out = self.left_out.total()
        share_left_out = num_left_out / max(num_left_out + self.corpus_size, 1)
        share_served = self._num_bad_positions / max(self._num_positions, 1)
        return share_left_out + (1 - share_left_out) * min(1.0, share_served + self._share_unreadable)

    @property
    def num_logged(self) -> int:
        """Number of bad samples that this process has logged."""
        return len(self._logged)

    def check_share(self) -> None:
        """Raise TooManyBadSamples where the share of bad samples is too large, as by those the index left out."""
        if self.share > self.max_bad_share:
            raise self._too_many()

    def check_unreadable(self) -> None:
        """Raise TooManyBadSamples where the share of unreadable samples alone is too large."""
        if self._share_unreadable > self.max_bad_share:
            raise self._too_many()

    def count_served(self, num_positions: int, num_bad: int) -> None:
        """Count positions, and those whose own sample was bad. Raises TooManyBadSamples above the limit."""
        with self._lock:
            self._num_positions += num_positions
            self._num_bad_positions += num_bad
        if num_bad and self._num_bad_positions >= _MIN_BAD and self.share > self.max_bad_share:
            raise self._too_many()

    def count_unreadable(self, num_samples: int) -> None:
        """Count samples that storage does not give, each once."""
        with self._lock:
            self._num_unreadable += num_samples

    def record(self, sample: BadSample) -> None:
        """Count and log a bad sample that reading showed; a known one changes nothing."""
        with self._lock:
            if sample.key not in self._known:
                self._known.add(sample.key)
                self._served[sample.reason] += 1
                self._append([sample])

    def log_left_out(self, samples: Iterable[BadSample]) -> None:
        """Log bad samples that the index left out, which are counted already."""
        with self._lock:
            self._append(list(samples))

    @property
    def _share_unreadable(self) -> float:
        return self._num_unreadable / max(self.corpus_size, 1)

    def _append(self, samples: list[BadSample]) -> None:
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # read another time
            self._read_new_lines(self.file.path)
        lines = [json.dumps(asdict(sample)) for sample in samples if (sample.key, sample.reason) not in self._logged]
        self._logged |= {(sample.key, sample.reason) for sample in samples}
        if lines:
            self.file.append(*lines)

    def _read_new_lines(self, log: Path) -> None:
        """Read what earlier runs and other ranks have logged since the last call. Raises OSError."""
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]  # another rank may be in the middle of a line
        self._read_bytes += len(complete)
        for line in complete.splitlines():
            with contextlib.suppress(ValueError):  # a killed run, or a full disk, can leave half a line
                record = json.loads(line)
                self._logged.add((record["key"], record["reason"]))

    def _too_many(self) -> TooManyBadSamples:
        counts = self.counts
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return TooManyBadSamples(
            f"{self.share:.1%} of the samples are bad ({listed}), more than "
            f"data.max_bad_share={self.max_bad_share:g} "
            "allows: the run stops before it trains on too little; mend the corpus"
            + (f" (keys in {self.file.path})" if self.file and self.file.path.exists() else "")
            + " or raise data.max_bad_share"
            + (self._hint(counts) if self._hint else ""),
            counts,
        )


class UnreadableRecord(NamedTuple):
    """From `position` on, in `epoch`, a sample is skipped, or with sample_idx WHOLE_SHARD all of its shard."""

    position: int
    epoch: int
    shard_idx: int
    sample_idx: int
    reason: str


class UnreadableLog:
    """The log of one run's unreadable samples, as one rank reads and writes it; `file` is the file."""

    def __init__(self, path: Path, rank: int) -> None:
        self.file, self._rank = AppendOnlyFile(path), rank
        text = path.read_bytes() if path.exists() else b""
        self._lines = [parsed for parsed in map(_parse_record, text.split(b"\n")) if parsed is not None]
        self._session = max((line["session"] for line in self._lines), default=0)

    def start_session(self, position: int) -> list[UnreadableRecord]:
        """Start a session at a position; return the records of earlier sessions that still count."""
        starts = {line["session"]: line["start"] for line in self._lines if "start" in line}
        self._session += 1
        starts[self._session] = position
        if self._rank == 0:
            self._append({"session": self._session, "start": position})
        records = [(line["session"], UnreadableRecord(*line["loss"])) for line in self._lines if "loss" in line]
        return [
            record
            for session, record in records
            if all(start > record.position for later, start in starts.items() if later > session)
        ]

    def add(self, record: UnreadableRecord) -> None:
        """Append a record of the current session."""
        self._append({"session": self._session, "loss": list(record)})

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self.file.append(json.dumps(line))


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; None for an incomplete or foreign one."""
    try:
        parsed: dict[str, Any] = json.loads(line)
        values = [parsed["session"], *([parsed["start"]] if "start" in parsed else parsed["loss"][:4])]
    except (ValueError, KeyError, TypeError):
        return None
    is_valid = all(type(value) is int for value in values) and ("start" in parsed or len(parsed["loss"]) == 5)
    return parsed if is_valid else None


class UnreadableShards:
    """The unreadable samples and shards of one rank. Thread-safe.

    `tracker` counts every sample skipped, and a whole shard by its size; `log` keeps the records for a resumed run.
    """

    def __init__(self, shard_sizes: Ints, tracker: BadSampleTracker, log: UnreadableLog | None = None) -> None:
        self._sizes, self._tracker, self._log = shard_sizes, tracker, log
        self._records: dict[tuple[int, int, int], UnreadableRecord] = {}  # by (epoch, shard, sample or WHOLE_SHARD)
        self._num_failed: Counter[tuple[int, int]] = Counter()  # samples that storage did not give, by (epoch, shard)
        self._counted: set[tuple[int, int]] = set()  # (shard, sample or WHOLE_SHARD) that the tracker has counted
        self._num_in_a_row = 0
        self._lock = threading.Lock()

    def is_skipped(self, location: SampleLocation, position: int) -> bool:
        """Whether a sample is skipped at a position."""
        shard = (location.epoch, location.shard_idx)
        records = (self._records.get((*shard, WHOLE_SHARD)), self._records.get((*shard, location.sample_idx)))
        return any(record is not None and record.position <= position for record in records)

    def add(self, location: SampleLocation, position: int, error: Unreadable) -> None:
        """Record that a sample cannot be read from `position` on, the first one of a batch.

        Raises StorageError when it is one shard too many in a row.
        """
        with self._lock:
            shard = (location.epoch, location.shard_idx)
            self._num_failed[shard] += error.is_waited_for
            is_whole = error.is_whole_shard or self._num_failed[shard] > _MAX_SAMPLES
            sample_idx = WHOLE_SHARD if is_whole else location.sample_idx
            is_new = (*shard, sample_idx) not in self._records  # several threads may meet it at once
            if is_new:
                record = UnreadableRecord(position, *shard, sample_idx, str(error))
                self._records[record[1:4]] = record
                self._count(location.shard_idx, sample_idx)
                if self._log is not None:
                    self._log.add(record)
            self._num_in_a_row += is_whole and is_new
        if self._num_in_a_row >= _MAX_SHARDS_IN_A_ROW:
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            raise StorageError(
                f"{self._num_in_a_row} shards in a row cannot be read ({why}; the last is shard "
                f"{location.shard_idx} at position {position}), each tried system.loader.tries times: storage does not "
                "answer; when it does again, go on with --resume"
            )

    def report_skipped(self, location: SampleLocation, key: str, position: int) -> None:
        """Report a skipped sample to the tracker as a bad one."""
        shard = (location.epoch, location.shard_idx)
        record = self._records.get((*shard, location.sample_idx)) or self._records[(*shard, WHOLE_SHARD)]
        self._tracker.record(BadSample(key, record.reason, position))

    def count_success(self) -> None:
        """Restart the count of failures in a row, after a sample was read."""
        self._num_in_a_row = 0

    def start_at(self, position: int) -> None:
        """Start reading at `position`: keep earlier records, also those of previous sessions and of all ranks."""
        logged = self._log.start_session(position) if self._log is not None else []
        with self._lock:
            self._records = {key: record for key, record in self._records.items() if record.position < position}
            for record in logged:
                self._records.setdefault(record[1:4], record)
                self._count(record.shard_idx, record.sample_idx)

    def records(self) -> list[UnreadableRecord]:
        """Return all records, by position."""
        return sorted(self._records.values())

    def _count(self, shard_idx: int, sample_idx: int) -> None:
        if (shard_idx, sample_idx) not in self._counted:
            self._counted.add((shard_idx, sample_idx))
            self._tracker.count_unreadable(int(self._sizes[shard_idx]) if sample_idx == WHOLE_SHARD else 1)
