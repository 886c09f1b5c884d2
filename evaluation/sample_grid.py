"""A picture of samples: a row for each of some classes, the same noise at several guidance scales side by side.

grid = SampleGrid(num_classes=1000, num_samples=10_000)
for batch in pair.samples(...): grid.add("guidance 4", batch)
grid.draw(names, Path("samples.png"))           # after grid.gather(), a collective
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine import world
from evaluation.figures import sample_grid
from evaluation.samples import Samples

ROWS, COLUMNS = 8, 4  # at most: classes, samples of each


class SampleGrid:
    """Keeps the samples that are shown: of classes spread over all, the first few each."""

    def __init__(self, num_classes: int, num_samples: int) -> None:
        present = min(num_classes, num_samples)
        rows = min(ROWS, present)
        self.classes = [row * present // rows + row % (present // rows) for row in range(rows)]  # not all of one column
        columns = min(COLUMNS, (num_samples - 1 - self.classes[-1]) // num_classes + 1)
        self._places = {
            label + column * num_classes: (row, column)
            for row, label in enumerate(self.classes)
            for column in range(columns)
        }
        self._shape = (rows, columns)
        self._kept: dict[str, dict[int, Tensor]] = {}  # panel -> sample number -> (H, W, 3) uint8

    def add(self, panel: str, batch: Samples) -> None:
        """Keeps what is shown of a batch."""
        kept = self._kept.setdefault(panel, {})
        for row, number in enumerate(batch.numbers.tolist()):
            if number in self._places:
                kept[number] = (batch.images[row] * 255).round().byte().permute(1, 2, 0).cpu()

    def gather(self) -> None:
        """Collects the pictures of all ranks on each. A collective."""
        merged: dict[str, dict[int, Tensor]] = {}
        for part in world.gather_objects(self._kept):
            for panel, kept in part.items():
                merged.setdefault(panel, {}).update(kept)
        self._kept = merged

    def draw(self, names: Sequence[str] | None, path: Path) -> None:
        """Writes the picture; `names` are those of all classes, where they are known."""
        panels = {}
        for panel, kept in self._kept.items():
            images = torch.full((*self._shape, *next(iter(kept.values())).shape), 255, dtype=torch.uint8)
            for number, image in kept.items():
                images[self._places[number]] = image
            panels[panel] = images
        sample_grid(panels, [names[label] if names else f"class {label}" for label in self.classes], path)
