"""Which losses a run has had, kept beside it, so that a run that goes on skips what it skipped before.

    runs/NAME/lost_shards.jsonl    {"session": 1, "start": 0}
                                   {"session": 1, "loss": [4711, 0, 3, -1, "vanished shard"]}
                                   {"session": 2, "start": 4800}

A session is one iteration over the data, from a position on. Of the losses of earlier sessions those count that lie
before the place where the next one took up: what came after was thrown away with the steps, and is tried again. All
ranks append to one file; the sessions' numbers tell their lines apart, in whatever order these arrive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from data.lines import Lines


class Loss(NamedTuple):
    """From `position` on, in `epoch`, a sample is skipped, or with sample_idx WHOLE all of its shard."""

    position: int
    epoch: int
    shard_idx: int
    sample_idx: int
    reason: str


class LossLog:
    """The file of one run as one rank reads and writes it; `lines` is the file."""

    def __init__(self, path: Path, rank: int) -> None:
        self.lines, self._rank = Lines(path), rank
        text = path.read_bytes() if path.exists() else b""
        self._records = [record for record in map(_record, text.split(b"\n")) if record is not None]
        self._session = max((record["session"] for record in self._records), default=0)

    def begin(self, position: int) -> list[Loss]:
        """Opens a session; gives the losses of earlier ones that still count."""
        starts = {r["session"]: r["start"] for r in self._records if "start" in r}
        self._session += 1
        starts[self._session] = position
        if self._rank == 0:
            self._append({"session": self._session, "start": position})
        losses = [(r["session"], Loss(*r["loss"])) for r in self._records if "loss" in r]
        return [
            loss
            for session, loss in losses
            if all(start > loss.position for later, start in starts.items() if later > session)
        ]

    def add(self, loss: Loss) -> None:
        """Writes a loss of this session down."""
        self._append({"session": self._session, "loss": list(loss)})

    def _append(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self.lines.append(json.dumps(record))


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for half a line, or any other."""
    try:
        record: dict[str, Any] = json.loads(line)
        values = [record["session"], *([record["start"]] if "start" in record else record["loss"][:4])]
    except (ValueError, KeyError, TypeError):
        return None
    is_whole = all(type(value) is int for value in values) and ("start" in record or len(record["loss"]) == 5)
    return record if is_whole else None
