"""The order of latents: every image once an epoch, the same rows on any number of ranks, a resume anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError
from data.latents.files import list_latent_files
from data.latents.loader import LatentLoader
from data.latents.store import LatentStore
from tests.data.latents.stores import random_latents, write_public_store

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return LatentStore(write_public_store(tmp_path_factory.mktemp("store"), [10, 7]))


def indices(loader: LatentLoader, first: int, count: int) -> np.ndarray:
    return loader.locate(np.arange(first, first + count))[0]


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(store: LatentStore) -> None:
    loader = LatentLoader(store, 0, 6, True)
    epochs = [indices(loader, 17 * epoch, 17) for epoch in (0, 1, 5)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], indices(LatentLoader(store, 1, 6, True), 0, 17))
    assert np.array_equal(
        indices(loader, 5, 40), np.concatenate([indices(loader, start, 8) for start in range(5, 45, 8)])
    )


def test_half_of_the_samples_are_mirrored_anew_each_epoch_or_none(store: LatentStore) -> None:
    loader = LatentLoader(store, 0, 6, True)
    places, is_flipped = loader.locate(np.arange(17 * 400))
    by_image = np.array([is_flipped[places == i].mean() for i in range(17)])
    assert 0.4 < by_image.min() < by_image.max() < 0.6  # 400 draws of 1/2: a deviation of 0.025
    assert not LatentLoader(store, 0, 6, False).locate(np.arange(100))[1].any()


def test_rows_are_normalised_latents_with_their_labels(store: LatentStore) -> None:
    loader, whole = LatentLoader(store, 3, 34, True), random_latents(17)
    batch = loader.batch(2)
    where, is_flipped = loader.locate(batch.positions_B)
    for row, (place, flip) in enumerate(zip(where, is_flipped, strict=True)):
        expected = whole["latents_flip" if flip else "latents"][place]
        restored = batch.latents_BLhw[row] * store.std.view(-1, 1, 1) + store.mean.view(-1, 1, 1)
        torch.testing.assert_close(restored, expected)
        assert batch.labels_B[row] == whole["labels"][place]
    assert batch.latents_BLhw.dtype == torch.float32
    assert batch.positions_B.tolist() == list(range(68, 102))
    everything = torch.cat([LatentLoader(store, 3, 17, True).batch(step).latents_BLhw for step in range(200)])
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 0.05  # 0.04 measured; not normalised, channels lie at 1 to 3
    assert (everything.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_serve_the_rows_of_one(store: LatentStore, world_size: int) -> None:
    alone = LatentLoader(store, 0, 12, True)
    ranks = [LatentLoader(store, 0, 12, True, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 2, 100):
        whole = alone.batch(step)
        for rank, loader in enumerate(ranks):
            own = loader.batch(step)
            assert own.latents_BLhw.equal(whole.latents_BLhw[rank::world_size])
            assert own.labels_B.equal(whole.labels_B[rank::world_size])
            assert np.array_equal(own.positions_B, whole.positions_B[rank::world_size])


def test_a_resume_goes_on_where_the_other_stopped(store: LatentStore) -> None:
    loader, again = LatentLoader(store, 0, 5, True), LatentLoader(store, 0, 5, True)
    batches = [loader.batch(step) for step in range(9)]
    for step in (8, 6):
        resumed = again.batch(step)
        assert resumed.step == step
        assert resumed.latents_BLhw.equal(batches[step].latents_BLhw)
        assert resumed.labels_B.equal(batches[step].labels_B)


def test_after_a_change_of_batch_the_next_sample_follows(store: LatentStore) -> None:
    """Three steps of 6, then steps of 4 on two ranks."""
    ranks = [LatentLoader(store, 0, 4, True, rank, 2) for rank in range(2)]
    served = np.stack([loader.batch(3, 3 * (6 - 4)).positions_B for loader in ranks], axis=1)
    assert served.flatten().tolist() == [18, 19, 20, 21]


def test_a_batch_larger_than_the_store_passes_over_epochs(store: LatentStore) -> None:
    where, _ = (loader := LatentLoader(store, 0, 40, True)).locate(loader.batch(0).positions_B)
    assert sorted(np.bincount(where).tolist()) == [2] * 11 + [3] * 6


def test_ranks_that_do_not_divide_the_batch_are_refused(store: LatentStore) -> None:
    with pytest.raises(UserError, match=r"batch.samples=10 over 4 ranks"):
        LatentLoader(store, 0, 10, True, 0, 4)


def test_flips_without_mirrored_latents_are_refused(tmp_path: Path) -> None:
    [path] = list_latent_files(write_public_store(tmp_path, [3]))
    save_file({key: rows for key, rows in load_file(path).items() if key != "latents_flip"}, path)
    with pytest.raises(UserError, match=r"latents\.flip=false"):
        LatentLoader(LatentStore(tmp_path), 0, 3, True)
    assert len(LatentLoader(LatentStore(tmp_path), 0, 3, False).batch(0).labels_B) == 3
