"""Latent loader: step number -> normalised latents for a generator, every image once an epoch, mirrored or not.

    loader = LatentLoader(LatentStore("latents/vtp_l"), seed=0, batch=1024, flip=True, rank=0, world_size=8)
    loader.batch(step=1000).latents_BLhw        # (128, L, h, w)

Global position g is number g mod N of epoch g div N, and index permutation(N, seed, epoch)[g mod N] of the
store. Rank r of W serves the positions r, r + W, ... of a step, so all ranks' rows together are the same for every W
that divides the batch, and a resume is a jump.

An epoch's permutation is held in memory: 10 MB and a few tenths of a second once an epoch for ImageNet's 1.28 million
images, where a Feistel network would hold nothing and hash several times for every row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs import UserError
from data.hashing import hash_words, permutation
from data.latents.store import LatentStore
from data.order import NUM_COMPARED_SAMPLES, chain_digest

Ints = NDArray[np.int64]
_EPOCH, _FLIP = 1, 2  # purposes of hashes


@dataclass(frozen=True)
class LatentBatch:
    """One rank's rows of a step; B = batch / world size."""

    latents_BLhw: Tensor  # float32, zero mean and unit deviation in each channel over the store
    labels_B: Tensor  # int64
    positions_B: Ints  # global positions: keys of the step's random numbers
    step: int

    def pinned(self) -> LatentBatch:
        """Return a copy in page-locked memory, from which copies to a GPU are asynchronous."""
        return replace(self, latents_BLhw=self.latents_BLhw.pin_memory(), labels_B=self.labels_B.pin_memory())


class LatentLoader:
    """The batches of one rank. `batch` is the global number of samples a step; `flip` mirrors half of them.

    Raises UserError where the ranks cannot share the batch, or the store lacks what `flip` needs.
    """

    def __init__(
        self,
        store: LatentStore,
        seed: int,
        batch: int,
        flip: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch % world_size:
            raise UserError(
                f"batch.samples={batch} over {world_size} ranks: every rank takes as many; give a multiple of the ranks"
            )
        if flip and not store.has_flips:
            raise UserError(
                f"{store.directory} holds no mirrored latents, which latents.flip=true draws half of the samples from: "
                "set latents.flip=false, or extract the latents with `python -m evaluation.latents`"
            )
        self.store, self.seed, self.samples, self.flip = store, seed, batch, flip
        self._rank, self._world_size = rank, world_size
        self._mean, self._std = store.mean.view(-1, 1, 1), store.std.view(-1, 1, 1)
        self._permutation = lru_cache(2)(self._permute)  # a batch can extend into the next epoch

    def batch(self, step: int, offset: int = 0) -> LatentBatch:
        """Return this rank's rows of the step whose first position is offset + step * batch.

        A pure function of (store, seed, step, offset, rank, world size).
        """
        positions_B = (
            offset + step * self.samples + np.arange(self._rank, self.samples, self._world_size, dtype=np.int64)
        )
        latents_BLhw, labels_B = self.store.read(*self.locate(positions_B))
        return LatentBatch((latents_BLhw.float() - self._mean) / self._std, labels_B, positions_B, step)

    def locate(self, positions_B: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Return the index in the store of each global position, and whether its image is mirrored."""
        epochs, within = np.divmod(positions_B, self.store.num_samples)
        indices = np.empty_like(positions_B)
        for epoch in np.unique(epochs):
            is_in_epoch = epochs == epoch
            indices[is_in_epoch] = self._permutation(int(epoch))[within[is_in_epoch]]
        is_flipped = (hash_words(self.seed, _FLIP, positions_B) >> np.uint64(63)).astype(bool)
        return indices, is_flipped & self.flip

    def facts(self, position: int) -> dict[str, str]:
        """Return the facts of the store that a resume compares with the checkpoint's, as data.order.CorpusFacts.at."""
        indices, is_flipped = self.locate(position + np.arange(NUM_COMPARED_SAMPLES))
        order = chain_digest("", map(int, hash_words(indices, is_flipped)))
        return {"samples": str(self.store.num_samples), "order of the next samples": order}

    def _permute(self, epoch: int) -> Ints:
        return permutation(self.store.num_samples, self.seed, _EPOCH, epoch)
