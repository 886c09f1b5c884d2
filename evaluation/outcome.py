"""What a task found: figures for evaluation.json, rows for whoever wants to look closer, pictures.

Outcome({"latent_top1": 0.81}, [{"features": "latent", "lr": 0.1, "top1": 0.81}], {"lr_sweep": draw})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from evaluation.products import Products

Figure = float | int | str


@dataclass(frozen=True)
class Outcome:
    """The answer of one task."""

    figures: Mapping[str, Figure]  # a sentence stands where a figure could not be computed
    rows: list[dict[str, Figure]] = field(default_factory=list)
    pictures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)  # name -> writes it to a path


class Task(Protocol):
    """One question about a tokenizer. All tasks of a run share one pass over the held-out pictures."""

    def add(self, batch: Products) -> None:
        """Looks at a batch; reads the products it needs. No collective: ranks may have different numbers of batches."""
        ...

    def result(self) -> Outcome:
        """The answer over all ranks, once, after the last batch; called on every rank, in the same order."""
        ...
