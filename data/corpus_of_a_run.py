"""The corpus as a run found it at its start: its shards and their sizes, kept beside the run.

    runs/NAME/corpus.json    {"of": {"train": ["corpus/*.tar"], "caption": "txt"},
                              "shards": {"corpus/00000.tar": 1000, ...}, "bad": {"missing caption": 3}}

The order of all samples hangs on the names and sizes of the shards. A run that goes on takes them from here: a shard
that has vanished since is skipped and counted like one that vanishes under the run, and one that was added since is
left out, where both would otherwise change every batch to come. It also spares looking at every index again.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.whole_file import write_whole


@dataclass(frozen=True)
class Found:
    """What opening a corpus found: usable samples of each shard by name, in order, and bad samples by reason."""

    shards: dict[str, int]
    bad: Counter[str]


def read(path: Path, train: Sequence[str], caption: str | None) -> tuple[Found, int] | None:
    """What a run wrote, and a checksum of it; None where there is nothing, or it is of another corpus or damaged."""
    try:
        text = path.read_bytes()
        stored = json.loads(text)
        if stored["of"] != _of(train, caption):
            return None
        shards = {str(name): int(size) for name, size in stored["shards"].items()}
        return Found(shards, Counter({str(reason): int(n) for reason, n in stored["bad"].items()})), zlib.crc32(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def shard_names(path: Path, train: Sequence[str]) -> list[str] | None:
    """Return the names of the shards that a run recorded for these patterns; None where it recorded none."""
    try:
        stored = json.loads(path.read_bytes())
        return list(stored["shards"]) if stored["of"]["train"] == list(train) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, train: Sequence[str], caption: str | None, found: Found) -> None:
    """It is there whole, or not. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"of": _of(train, caption), "shards": found.shards, "bad": found.bad}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _of(train: Sequence[str], caption: str | None) -> dict[str, Any]:
    return {"train": list(train), "caption": caption}
