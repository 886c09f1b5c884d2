"""What a corpus is made of: samples, and the plan that says which.

Sample(b"\\xff\\xd8...", "jpg", "a red heart", {"label": 32}).members()
# {"jpg": b"\\xff\\xd8...", "txt": b"a red heart", "json": b'{"label": 32}'}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """`image` is a whole file of the format `extension` names: jpg, png or webp. `attributes` are JSON."""

    image: bytes
    extension: str
    caption: str
    attributes: dict[str, Any]

    def members(self) -> dict[str, bytes]:
        """Member extension -> bytes, as webdataset and img2dataset lay a sample out."""
        attributes = json.dumps(self.attributes, ensure_ascii=False, sort_keys=True)
        return {
            self.extension: self.image,
            "txt": self.caption.encode("utf-8", "replace"),
            "json": attributes.encode("utf-8", "replace"),
        }


@dataclass(frozen=True)
class Plan:
    """A corpus to be written. The same `arguments` stand for the same content."""

    arguments: dict[str, Any]
    splits: dict[str, Iterator[Sample]]  # "train" and "held_out"; each is read once
    counts: dict[str, int]  # how many samples each split holds at most, for the progress shown
    shard_size: int
    vocab: int | None  # size of the tokenizer to train on the train captions; None: none
    files: Callable[[], dict[str, Any]]  # file name -> text or JSON content, asked for after the samples were read
