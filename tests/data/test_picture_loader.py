"""Pictures alone are the clip pictures of the same positions, at every world size, and ask for no captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from configs.data import ImageView, Pictures
from configs.system import Loader as LoaderSettings
from data.loader import Loader
from data.picture_loader import PictureLoader
from tests.data.tar_shards import LetterEncoder, encoded, write_corpus, write_tar
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

VIEW = ImageView(image_size=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_shards=6, per_shard=7)
    return folder


@contextmanager
def loading(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[PictureLoader]:
    data = Pictures(train=(f"{folder}/*.tar",), streams=6)
    loader = PictureLoader(data, VIEW, 12, 0, LoaderSettings(), rank=rank, world_size=world_size)
    yield loader
    loader.close()


def test_they_are_the_pictures_that_pre_training_sees_at_the_same_step(corpus: Path) -> None:
    config = tiny_config(f"data.train=[{corpus}/*.tar]", "views.image_size=16", "views.global_size=16")
    pretraining = Loader(config, LetterEncoder())
    with loading(corpus) as loader:
        for step in (0, 9):
            expected, found = pretraining.batch(step), loader.batch(step)
            assert found.keys == expected.keys
            assert found.images.equal(expected.images)
            assert found.step == step
    pretraining.close()


def test_the_global_batch_is_the_same_on_three_ranks_as_on_one(corpus: Path) -> None:
    with loading(corpus) as loader:
        whole = loader.batch(5)
    parts = []
    for rank in range(3):
        with loading(corpus, rank, 3) as loader:
            parts.append(loader.batch(5).images)
    assert torch.stack(parts, dim=1).flatten(0, 1).equal(whole.images)


def test_with_an_offset_a_step_begins_so_many_samples_later(corpus: Path) -> None:
    with loading(corpus) as loader:
        whole = [*loader.batch(2).keys, *loader.batch(3).keys]
        assert next(loader.iterate(4, -18)).keys == tuple(whole[6:18])


def test_iterating_starts_where_it_is_told_and_needs_no_captions(tmp_path: Path) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", {f"{i}.jpg": encoded(i) for i in range(4)})
    with loading(tmp_path) as loader:
        ahead = loader.iterate(3)
        first, second = next(ahead), next(ahead)
        assert (first.step, second.step) == (3, 4)
        assert first.images.equal(loader.batch(3).images)
        assert loader.wait_seconds > 0
        assert not loader.health.counts
