"""Features of a whole corpus, extracted once and shared by all probes.

    bank = FeatureBank(capacity=len(images), folder=run)
    for batch in ...: bank.add(batch)
    features = bank.gather("training")   # on the first rank: those of all ranks, in index order
    features.sets["latent"].shape        # (n, L)

Small matrices live in memory; larger ones in an unnamed memory-mapped file, so ImageNet's 26 GB with a ViT-L need disk
space rather than memory.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError
from data.held_out import check_number_of_classes
from engine import distributed
from evaluation.tokenizer_source import TokenizerOutputs
from model.latent import feature_width

MEMORY_BYTES = 4 << 30  # a larger matrix is mapped from a file
CHUNK_ROWS = 8192  # sent between ranks at once


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and labels of N images; the kinds of feature are side by side in the columns of `rows_NW`."""

    rows_NW: Tensor
    labels_N: Tensor
    widths: dict[str, int]  # number of columns of each kind, in the order of TokenizerOutputs.features
    trunk_width: int

    @property
    def sets(self) -> dict[str, Tensor]:
        """Views of the columns that are probed, by name: (n, width).

        latent: as in the paper's curves. last_1_block: CLS and mean patch of the last block; last_4_blocks: the CLS
        tokens of the last four and that mean patch; both as in the released table. A convolutional encoder has latent
        only.
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


class FeatureBank:
    """Collects the features of labelled images. Tasks may share one: a batch added several times is kept once."""

    def __init__(self, capacity: int, folder: Path) -> None:
        self._capacity, self._folder, self._count = capacity, folder, 0
        self._rows_NW: Tensor | None = None
        self._labels = torch.empty(capacity, dtype=torch.int64)
        self._positions = torch.empty(capacity, dtype=torch.int64)
        self._widths: dict[str, int] = {}
        self._trunk_width = 0
        self._last: TokenizerOutputs | None = None

    def add(self, batch: TokenizerOutputs) -> None:
        """Add a batch's labelled images; label -1 means none. Raises UserError for a label below -1."""
        if batch is self._last:
            return
        self._last = batch
        if (batch.labels < -1).any():
            raise UserError(
                f"a sample has label {int(batch.labels.min())}: labels are integers from 0 on; correct the corpus"
            )
        check_number_of_classes(batch.labels)
        is_labelled = batch.labels >= 0
        if not is_labelled.any():
            return
        rows_BW = torch.cat(list(batch.features.values()), dim=1)[is_labelled].cpu()
        if self._rows_NW is None:
            self._widths = {name: x.shape[1] for name, x in batch.features.items()}
            self._trunk_width = feature_width(batch.tokenizer.model)
            self._rows_NW = allocate_matrix(self._capacity, rows_BW.shape[1], self._folder)
        own = slice(self._count, self._count + len(rows_BW))
        self._rows_NW[own] = rows_BW
        self._labels[own] = batch.labels[is_labelled].cpu()
        self._positions[own] = batch.positions[is_labelled.cpu()]
        self._count = own.stop

    def gather(self, split: str) -> LabelledFeatures | None:
        """Gather all ranks' rows, in index order, on the first rank; None on the others. A collective.

        Raises UserError, on every rank, if no sample of `split` has a label.
        """
        positions, labels = self._positions[: self._count], self._labels[: self._count]
        parts = distributed.gather_objects((positions, labels, self._widths, self._trunk_width))
        if not sum(len(part[0]) for part in parts):
            raise UserError(
                f"no {split} sample has a label: a probe learns from the class number or name in field `label` of the "
                ".json member, or in the .cls member; give labelled shards"
            )
        widths, trunk_width = next((part[2], part[3]) for part in parts if part[2])
        if distributed.world_size() == 1:
            assert self._rows_NW is not None
            return LabelledFeatures(self._rows_NW[: self._count], labels, widths, trunk_width)
        order = torch.cat([part[0] for part in parts]).argsort()
        labels_N = torch.cat([part[1] for part in parts])[order]
        targets_N = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))  # inverse permutation
        rows_NW = self._gather_rows(targets_N, [len(part[0]) for part in parts], widths)
        return LabelledFeatures(rows_NW, labels_N, widths, trunk_width) if rows_NW is not None else None

    def _gather_rows(self, targets_N: Tensor, counts: list[int], widths: dict[str, int]) -> Tensor | None:
        """Gather rows in chunks on the first rank: the i-th row over all ranks goes to row targets_N[i].

        `counts` are the numbers of rows of the ranks.
        """
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        rows_NW = (
            allocate_matrix(len(targets_N), sum(widths.values()), self._folder) if distributed.is_first() else None
        )
        for first in range(0, max(counts), CHUNK_ROWS):
            own = None if self._rows_NW is None else self._rows_NW[first : min(first + CHUNK_ROWS, self._count)].clone()
            for start, part in zip(starts, distributed.gather_objects(own), strict=True):
                if rows_NW is not None and part is not None:
                    rows_NW[targets_N[start + first : start + first + len(part)]] = part
        return rows_NW


def allocate_matrix(rows: int, width: int, folder: Path) -> Tensor:
    """Allocate (rows, width) float32 in memory or, if large, mapped from an unnamed file in `folder`."""
    if rows * width * 4 <= MEMORY_BYTES:
        return torch.empty(rows, width)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # its name goes with this block, its bytes with the tensor
        file.truncate(rows * width * 4)
        return torch.from_file(file.name, shared=True, size=rows * width).view(rows, width)
