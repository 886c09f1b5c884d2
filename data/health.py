"""Bad samples: counted by reason, written down once, and never tried twice.

A bad sample is no reason to stop a run of weeks; a corpus that is mostly bad is. The share is that of the
whole corpus as far as it is known: what the index left out counts from the start, what only reading shows
counts as it is met, by its share of what was met, and what storage lost (data/losses.py) by its own size: a shard that
is gone is many positions in a row, and says nothing of the other shards.

    health = Health(max_bad_share=0.02, corpus_size=1000, left_out=Counter({"missing caption": 3}), log=None)
    health.met(BadSample("00000/000000123", "truncated image", position=4711))
    health.counts                                   # {"missing caption": 3, "truncated image": 1}
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from configs import UserError
from data.lines import Lines

_MIN_MET = 16  # bad samples met before their share says anything: 16 are no accident below the limit


class TooManyBadSamples(UserError):
    """The share of bad samples is above data.max_bad_share; `counts` holds them by reason."""

    def __init__(self, message: str, counts: Counter[str]) -> None:
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True)
class BadSample:
    """One sample that was not served, and why."""

    key: str  # "shard/sample"
    reason: str
    position: int | None  # global position at which it was met; None: left out by the index


class Health:
    """The bad samples of one process. Thread-safe.

    `corpus_size` counts the samples the index kept and `left_out` those it did not. `log` (jsonl) gets each
    bad sample once, over resumed runs and over ranks that share the file too; `lines` is that file. `hint` gives
    the end of the error message from the counts.
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
        self.lines = None if log is None else Lines(log)
        self._hint = hint
        self._met: Counter[str] = Counter()
        self._known: set[str] = set()
        self._num_positions = self._num_bad_positions = self._num_lost = 0
        self._logged: set[tuple[str, str]] = set()
        self._read_bytes = 0
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counter[str]:
        """Distinct bad samples by reason, those left out by the index included."""
        return self.left_out + self._met

    @property
    def share(self) -> float:
        """The bad share of the corpus: exact for what the index shows, by positions met for the rest."""
        num_left_out = self.left_out.total()
        share_left_out = num_left_out / max(num_left_out + self.corpus_size, 1)
        share_met = self._num_bad_positions / max(self._num_positions, 1)
        return share_left_out + (1 - share_left_out) * min(1.0, share_met + self._share_lost)

    def check_share(self) -> None:
        """Raise TooManyBadSamples where the share of bad samples is too large, as by those the index left out."""
        if self.share > self.max_bad_share:
            raise self._stop()

    @property
    def num_logged(self) -> int:
        """Number of bad samples that this process has logged."""
        return len(self._logged)

    def served(self, num_positions: int, num_bad: int) -> None:
        """Notes positions met and how many had a bad sample of their own.

        Raises TooManyBadSamples above the limit.
        """
        with self._lock:
            self._num_positions += num_positions
            self._num_bad_positions += num_bad
        if num_bad and self._num_bad_positions >= _MIN_MET and self.share > self.max_bad_share:
            raise self._stop()

    def check_lost(self) -> None:
        """Raise TooManyBadSamples where the share of unreadable samples alone is above the limit."""
        if self._share_lost > self.max_bad_share:
            raise self._stop()

    def lost(self, num_samples: int) -> None:
        """Notes samples that storage does not give, each once."""
        with self._lock:
            self._num_lost += num_samples

    def met(self, sample: BadSample) -> None:
        """Counts and logs a bad sample that reading showed; a known one changes nothing."""
        with self._lock:
            if sample.key not in self._known:
                self._known.add(sample.key)
                self._met[sample.reason] += 1
                self._append([sample])

    @property
    def _share_lost(self) -> float:
        return self._num_lost / max(self.corpus_size, 1)

    def note_left_out(self, samples: Iterable[BadSample]) -> None:
        """Logs bad samples of the index; they are counted already."""
        with self._lock:
            self._append(list(samples))

    def _append(self, samples: list[BadSample]) -> None:
        if self.lines is None:
            return
        with contextlib.suppress(OSError):  # what cannot be read now is learnt another time
            self._catch_up(self.lines.path)
        lines = [json.dumps(asdict(sample)) for sample in samples if (sample.key, sample.reason) not in self._logged]
        self._logged |= {(sample.key, sample.reason) for sample in samples}
        if lines:
            self.lines.append(*lines)

    def _catch_up(self, log: Path) -> None:
        """Learns what earlier runs and other ranks wrote since the last look. Raises OSError."""
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(self._read_bytes)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]  # another rank may be in the middle of a line
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a killed run, or a full disk, can leave half a line
                record = json.loads(line)
                self._logged.add((record["key"], record["reason"]))

    def _stop(self) -> TooManyBadSamples:
        counts = self.counts
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return TooManyBadSamples(
            f"{self.share:.1%} of the samples are bad ({listed}), more than "
            f"data.max_bad_share={self.max_bad_share:g} "
            "allows: the run stops before it trains on too little; mend the corpus"
            + (f" (keys in {self.lines.path})" if self.lines and self.lines.path.exists() else "")
            + " or raise data.max_bad_share"
            + (self._hint(counts) if self._hint else ""),
            counts,
        )
