"""Features of a whole corpus, extracted once and read by every task that learns from them.

    bank = Bank(capacity=len(pictures), folder=run)
    for batch in ...: bank.add(batch)
    features = bank.gathered()           # on the first rank: those of all ranks, in index order
    features.sets["latent"].shape        # (n, L)

Small matrices live in memory; larger ones in an unnamed file that is mapped, so that ImageNet's 26 GB with a ViT-L
need a disk and not that much memory.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError
from data.held_out import check_number_of_classes
from engine import world
from evaluation.products import Products
from model.latent import feature_width

MEMORY_BYTES = 4 << 30  # a larger matrix is mapped from a file
CHUNK_ROWS = 8192  # sent at once between ranks


@dataclass(frozen=True)
class Features:
    """Labelled rows: `rows_NW` float32 holds the kinds of feature side by side, `widths` says where."""

    rows_NW: Tensor
    labels_N: Tensor
    widths: dict[str, int]  # as Products.features has them
    trunk_width: int

    @property
    def sets(self) -> dict[str, Tensor]:
        """Views of the columns that each kind of probe reads: (n, width).

        latent: the paper's curves. last_1_block: CLS and mean patch of the last block; last_4_blocks: the CLS tokens of
        the last four and that mean patch: the two of the released table. Of a convolutional encoder latent alone.
        """
        sets, start = {}, 0
        for name, width in self.widths.items():
            sets[name] = self.rows_NW[:, start : start + width]
            start += width
        blocks = sets.pop("blocks", None)
        if blocks is None:
            return sets
        last = blocks.shape[1] // self.trunk_width - 1
        sets["last_1_block"] = blocks[:, -2 * self.trunk_width :]
        return sets | ({f"last_{last}_blocks": blocks} if last > 1 else {})


class Bank:
    """Collects the features of labelled samples. Several tasks may share one: a batch is kept once."""

    def __init__(self, capacity: int, folder: Path) -> None:
        self._capacity, self._folder, self._count = capacity, folder, 0
        self._rows_NW: Tensor | None = None
        self._labels = torch.empty(capacity, dtype=torch.int64)
        self._positions = torch.empty(capacity, dtype=torch.int64)
        self._widths: dict[str, int] = {}
        self._trunk_width = 0
        self._last: Products | None = None

    def add(self, batch: Products) -> None:
        """Keeps a batch's labelled rows. Raises UserError for a label that is no class; -1 means that there is none."""
        if batch is self._last:
            return
        self._last = batch
        if (batch.labels < -1).any():
            raise UserError(
                f"a sample has label {int(batch.labels.min())}: labels are integers from 0 on; mend the corpus"
            )
        check_number_of_classes(batch.labels)
        is_labelled = batch.labels >= 0
        if not is_labelled.any():
            return
        rows_BW = torch.cat(list(batch.features.values()), dim=1)[is_labelled].cpu()
        if self._rows_NW is None:
            self._widths = {name: x.shape[1] for name, x in batch.features.items()}
            self._trunk_width = feature_width(batch.tokenizer.model)
            self._rows_NW = matrix(self._capacity, rows_BW.shape[1], self._folder)
        own = slice(self._count, self._count + len(rows_BW))
        self._rows_NW[own] = rows_BW
        self._labels[own] = batch.labels[is_labelled].cpu()
        self._positions[own] = batch.positions[is_labelled.cpu()]
        self._count = own.stop

    def gathered(self, split: str) -> Features | None:
        """All ranks' rows in index order on the first rank, None on the others. A collective.

        Raises UserError, on every rank, where no sample of `split` has a label.
        """
        positions, labels = self._positions[: self._count], self._labels[: self._count]
        told = world.gather_objects((positions, labels, self._widths, self._trunk_width))
        if not sum(len(part[0]) for part in told):
            raise UserError(
                f"no {split} sample has a label: a probe learns from the class number or name in field `label` of the "
                ".json member, or in the .cls member; give labelled shards"
            )
        widths, trunk_width = next((part[2], part[3]) for part in told if part[2])
        if world.world_size() == 1:
            assert self._rows_NW is not None
            return Features(self._rows_NW[: self._count], labels, widths, trunk_width)
        order = torch.cat([part[0] for part in told]).argsort()
        labels_N = torch.cat([part[1] for part in told])[order]
        rows_NW = self._sent(torch.empty_like(order).scatter_(0, order, torch.arange(len(order))), told, widths)
        return Features(rows_NW, labels_N, widths, trunk_width) if rows_NW is not None else None

    def _sent(self, places_N: Tensor, told: list, widths: dict[str, int]) -> Tensor | None:
        """Rank by rank, chunk by chunk: row i of what was told belongs at places_N[i]."""
        counts = [len(part[0]) for part in told]
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        rows_NW = matrix(len(places_N), sum(widths.values()), self._folder) if world.is_first() else None
        for first in range(0, max(counts), CHUNK_ROWS):
            own = None if self._rows_NW is None else self._rows_NW[first : min(first + CHUNK_ROWS, self._count)].clone()
            for start, part in zip(starts, world.gather_objects(own), strict=True):
                if rows_NW is not None and part is not None:
                    rows_NW[places_N[start + first : start + first + len(part)]] = part
        return rows_NW


def matrix(rows: int, width: int, folder: Path) -> Tensor:
    """(rows, width) float32, uninitialised: in memory, or mapped from a nameless file in `folder` where it is large."""
    if rows * width * 4 <= MEMORY_BYTES:
        return torch.empty(rows, width)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # its name goes with this block, its bytes with the tensor
        file.truncate(rows * width * 4)
        return torch.from_file(file.name, shared=True, size=rows * width).view(rows, width)
