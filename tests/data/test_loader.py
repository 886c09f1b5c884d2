"""Batches are a pure function of the step: on resume, on any world size, with a fifth of the corpus bad.

Images alone are the clip images of the same positions, at every world size, and need no captions.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from configs import Config, UserError
from configs.data import ImageData, ImageView
from configs.run import LoaderSettings as LoaderSettings
from data.bad_samples import TooManyBadSamples
from data.batch import Batch
from data.loader import BatchLoader, ImageLoader
from tests.data.tar_shards import LetterEncoder, encoded, huge_png, write_corpus, write_tar
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

SMALL = ("views.image_size=16", "views.global_size=16", "views.local_size=8")
CLIP_ONLY = (
    "batch.clip=60",
    "batch.ssl=0",
    "objectives.ssl.weight=0",
    "batch.rec=0",
    "objectives.rec.weight=0",
)


def config_for(folder: Path, *overrides: str) -> Config:
    return tiny_config(f"data.train=[{folder}/*.tar]", *SMALL, *overrides)


@contextmanager
def loading(config: Config, **options: object) -> Iterator[BatchLoader]:
    loader = BatchLoader(config, LetterEncoder(), **options)  # type: ignore[arg-type]
    yield loader
    loader.close()


def batches(config: Config, steps: list[int], world_size: int = 1) -> list[list[Batch]]:
    """[step][rank]"""
    by_rank = []
    for rank in range(world_size):
        with loading(config, rank=rank, world_size=world_size) as loader:
            by_rank.append([loader.batch(step) for step in steps])
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def joined(ranks: list[Batch], field: str, views: int) -> torch.Tensor:
    """The global tensor from its ranks' rows: row i of rank r is row i * W + r of its view."""
    parts = [getattr(batch, field).unflatten(0, (views, -1)) for batch in ranks]
    return torch.stack(parts, dim=2).flatten(1, 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_shards=8, per_shard=9)
    return folder


# --- what a batch holds


def test_a_batch_holds_what_its_contract_says(corpus: Path) -> None:
    config = config_for(corpus)
    [[batch]] = batches(config, [4])
    assert batch.images.shape == (12, 3, 16, 16)
    assert batch.global_crops.shape == (12, 3, 16, 16)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert {t.dtype for t in (batch.images, batch.global_crops, batch.local_crops)} == {torch.uint8}
    assert batch.masks.shape == (12, 4)
    assert batch.masked_idx.tolist() == batch.masks.flatten().nonzero().flatten().tolist()
    assert batch.step == 4
    names = [f"sample {int(key.split('/')[1])}" for key in batch.keys]
    assert batch.captions.equal(LetterEncoder().encode(names))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_global_batches_are_the_same_for_every_world_size(corpus: Path, world_size: int) -> None:
    config, steps = config_for(corpus), [0, 7, 30]
    for [whole], ranks in zip(batches(config, steps), batches(config, steps, world_size), strict=True):
        keys = [ranks[i % world_size].keys[i // world_size] for i in range(12)]
        assert tuple(keys) == whole.keys
        counts = {"images": 1, "captions": 1, "global_crops": 2, "local_crops": 2, "masks": 2}
        for field, views in counts.items():
            assert joined(ranks, field, views).flatten(0, 1).equal(getattr(whole, field)), field


def test_an_epoch_later_a_sample_shows_other_crops_and_the_same_step_the_same(corpus: Path) -> None:
    config = config_for(corpus)
    with loading(config) as loader:
        first = {key: image for step in range(6) for key, image in _images(loader.batch(step))}
        later = {key: image for step in range(60, 66) for key, image in _images(loader.batch(step))}
        assert loader.batch(3).images.equal(loader.batch(3).images)
    shared = sorted(set(first) & set(later))
    assert len(shared) > 20
    assert sum(first[key].equal(later[key]) for key in shared) < len(shared) // 4


def test_objectives_that_are_off_leave_empty_tensors(corpus: Path) -> None:
    [[batch]] = batches(config_for(corpus, *CLIP_ONLY), [0])
    assert batch.images.shape == (60, 3, 16, 16)
    assert batch.global_crops.shape == (0, 3, 16, 16)
    assert batch.local_crops.shape == (0, 3, 8, 8)
    assert batch.masks.shape == (0, 4)
    assert len(batch.masked_idx) == 0


def test_without_the_clip_objective_images_need_no_captions(tmp_path: Path) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", {f"{i}.jpg": encoded(i) for i in range(4)})
    [[batch]] = batches(config_for(tmp_path, "objectives.clip.weight=0"), [0])
    assert batch.captions.shape == (0, 12)
    assert batch.images.shape[0] == 12


def test_no_local_crops_when_none_are_configured(corpus: Path) -> None:
    [[batch]] = batches(config_for(corpus, "views.num_locals=0"), [0])
    assert batch.local_crops.shape == (0, 3, 8, 8)
    assert batch.global_crops.shape == (12, 3, 16, 16)


def test_a_world_size_that_does_not_divide_the_streams_is_a_user_error(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"data\.streams=6 over 4 ranks"):
        BatchLoader(config_for(corpus), LetterEncoder(), rank=0, world_size=4)


# --- iterating


def test_iterating_gives_the_batches_of_the_steps_from_the_start_step(corpus: Path) -> None:
    config = config_for(corpus)
    with loading(config) as loader:
        ahead = loader.iterate(start_step=5)
        iterated = [next(ahead) for _ in range(3)]
        assert [batch.step for batch in iterated] == [5, 6, 7]
        assert loader.wait_seconds > 0
        assert loader.wait_seconds == 0
    for batch, [direct] in zip(iterated, batches(config, [5, 6, 7]), strict=True):
        assert batch.keys == direct.keys
        assert batch.local_crops.equal(direct.local_crops)


@pytest.mark.parametrize(("start_step", "batch", "world_size"), [(5, 24, 1), (5, 24, 3), (2, 6, 2)])
def test_after_a_change_of_batch_no_sample_is_skipped_or_repeated(
    corpus: Path, start_step: int, batch: int, world_size: int
) -> None:
    """Steps of 12 up to `start_step`; what comes then is as if a step were its positions alone."""
    sequence = [key for [whole] in batches(config_for(corpus), list(range(10))) for key in whole.keys]
    config = config_for(corpus, f"batch.clip={batch}", "batch.ssl=6", "batch.rec=6")
    offset = start_step * (12 - batch)
    ranks = []
    for rank in range(world_size):
        with loading(config, rank=rank, world_size=world_size) as loader:
            ahead = loader.iterate(start_step, offset)
            ranks.append([key for _ in range(2) for key in next(ahead).keys])
    served = [key for keys in zip(*ranks, strict=True) for key in keys]
    assert served == sequence[start_step * 12 :][: 2 * batch]


def test_an_error_in_the_background_reaches_the_consumer_and_threads_end(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    loader = BatchLoader(config_for(corpus), LetterEncoder())
    monkeypatch.setattr(loader, "_captions", lambda rows: (_ for _ in ()).throw(RuntimeError("no more captions")))
    with pytest.raises(RuntimeError, match="no more captions"):
        next(loader.iterate())
    loader.close()
    assert threading.active_count() == before


# --- 1,000 samples, 200 of them bad in ten ways

GOOD = 800
EXPECTED = dict.fromkeys(
    ["missing caption", "missing image", "empty image", "wrong member type", "duplicate key",
     "truncated image", "web page", "heic image", "too many pixels", "undecodable image"],
    20,
)  # fmt: skip
SEEN_BY_INDEX = ["missing caption", "missing image", "empty image", "wrong member type", "duplicate key"]


def bad_members(reason: str, key: str, key_before: str) -> list[tuple[str, bytes | str]]:
    i = int(key)
    corrupt = bytearray(encoded(i, "PNG"))
    corrupt[len(corrupt) // 2] ^= 0xFF
    text = (f"{key}.txt", b"bad")
    return {
        "missing caption": [(f"{key}.jpg", encoded(i))],
        "missing image": [text],
        "empty image": [(f"{key}.jpg", b""), text],
        "wrong member type": [(f"{key}.jpg", f"{key_before}.jpg"), text],
        "duplicate key": [(f"{key_before}.jpg", encoded(i)), (f"{key_before}.txt", b"bad")],
        "truncated image": [(f"{key}.jpg", encoded(i)[:-150]), text],
        "web page": [(f"{key}.jpg", b"<!DOCTYPE html><p>gone"), text],
        "heic image": [(f"{key}.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), text],
        "too many pixels": [(f"{key}.png", huge_png()), text],
        "undecodable image": [(f"{key}.png", bytes(corrupt)), text],
    }[reason]


@pytest.fixture(scope="module")
def bad_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 shards of 100 samples; every fifth is bad, each shard has two of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    reasons = list(EXPECTED)
    for shard in range(10):
        members: list[tuple[str, bytes | str]] = []
        for i in range(shard * 100, shard * 100 + 100):
            key = f"{i:06d}"
            if i % 5 == 3:
                members += bad_members(reasons[i // 5 % 10], key, f"{i - 1:06d}")
            else:
                members += [(f"{key}.jpg", encoded(i)), (f"{key}.txt", b"sample %d" % i)]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def test_with_200_of_1000_samples_bad_every_good_one_is_seen_in_every_epoch(bad_corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "bad_samples.jsonl"
    config = config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.25")
    seen: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    fills = 0
    with loading(config, bad_log=log) as loader:
        for step in range(55):  # two epochs of the longest stream
            batch = loader.batch(step)
            assert len(batch.keys) == 60  # batches stay full
            for row, key in enumerate(batch.keys):
                place = loader.reader.order.locate(step * 60 + row)
                own = loader.reader.shards.index(place.shard_idx).key(place.sample_idx)
                fills += own != key
                if place.epoch in seen and own == key:
                    seen[place.epoch][key] += 1
        assert loader.bad_samples.counts == EXPECTED
        assert loader.bad_samples.share == pytest.approx(0.2, abs=0.01)
    good = {f"{i // 100:05d}/{i:06d}" for i in range(1000) if i % 5 != 3}
    assert len(good) == GOOD
    for counts in seen.values():
        assert counts == dict.fromkeys(good, 1)
    assert fills > 300  # 100 of the 900 samples that the index keeps are bad: about 0.11 * 3,300
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert Counter(record["reason"] for record in records) == EXPECTED
    assert all((record["position"] is None) == (record["reason"] in SEEN_BY_INDEX) for record in records)


def test_bad_places_are_filled_alike_on_resume_and_on_every_world_size(bad_corpus: Path) -> None:
    config = config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.25")
    reference = batches(config, list(range(12)))  # later steps know bad samples from earlier ones
    for world_size in (1, 2, 3):
        for step, ranks in zip((11, 2), batches(config, [11, 2], world_size), strict=True):
            [whole] = reference[step]
            assert tuple(ranks[i % world_size].keys[i // world_size] for i in range(60)) == whole.keys
            assert joined(ranks, "images", 1)[0].equal(whole.images)


def test_above_the_configured_share_the_run_stops_with_the_counts(bad_corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "bad_samples.jsonl"
    with pytest.raises(TooManyBadSamples, match=rf"\(keys in {log}\)") as at_once:
        BatchLoader(config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.05"), LetterEncoder(), bad_log=log)
    assert at_once.value.counts == dict.fromkeys(SEEN_BY_INDEX, 20)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert Counter(record["reason"] for record in records) == at_once.value.counts
    with (
        loading(config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.15")) as loader,
        pytest.raises(TooManyBadSamples, match=r"20 missing caption.*more than data\.max_bad_share=0\.15") as later,
    ):
        for _, _batch in zip(range(55), loader.iterate(), strict=False):
            pass
    assert set(later.value.counts) == set(EXPECTED)


def test_the_summary_of_a_corpus_counts_left_out_samples(bad_corpus: Path) -> None:
    with loading(config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.25")) as loader:
        summary = loader.reader.summary()
    left_out = ", ".join(f"20 {reason}" for reason in sorted(SEEN_BY_INDEX))
    assert sorted(summary.partition("left out: ")[2].split(", ")) == left_out.split(", ")
    assert summary.startswith("corpus: 10 shards, 900 samples; 100 left out: ")


def test_a_bad_sample_is_read_only_once(bad_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    with loading(config_for(bad_corpus, *CLIP_ONLY, "data.max_bad_share=0.25")) as loader:
        original = loader.reader.shards.read

        def counted(*arguments: int) -> object:
            sample = original(*arguments)
            reads[sample.key] += 1
            return sample

        monkeypatch.setattr(loader.reader.shards, "read", counted)
        for step in range(30):
            loader.batch(step)
        bad = {loader.reader.shards.index(shard).key(i) for shard, i in loader.reader._bad}
    assert len(bad) > 80
    assert {reads[key] for key in bad} == {1}


def test_a_corpus_without_one_readable_image_ends_in_a_user_error(tmp_path: Path) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", {"0.jpg": b"<html>", "0.txt": b"page"})
    config = config_for(tmp_path, "data.max_bad_share=1.0")
    reason = r"no readable sample among 1000 of its stream.*'web page'"
    with loading(config) as loader, pytest.raises(UserError, match=reason):
        loader.batch(0)


def _images(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    return list(zip(batch.keys, batch.images, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_nothing_of_a_batch_ahead_of_a_gpu_lies_in_pageable_memory(corpus: Path, device: str) -> None:
    with loading(config_for(corpus, f"system.loader.device={device}")) as loader:
        batch = next(loader.iterate())
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_cuda or tensor.is_pinned() for tensor in tensors)


def test_a_pinned_batch_is_the_same_batch(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory needs a CUDA driver: here a copy stands in. What is on a device already is left alone."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    with loading(config_for(corpus)) as loader:
        batch = loader.batch(0)
        elsewhere = dataclasses.replace(batch, images=batch.images.to("meta"))
        pinned = elsewhere.pinned()
        assert pinned.images is elsewhere.images
        assert torch.equal(pinned.global_crops, batch.global_crops)
        assert pinned.global_crops.data_ptr() != batch.global_crops.data_ptr()
        assert (pinned.step, pinned.keys) == (batch.step, batch.keys)


VIEW = ImageView(image_size=16)


@pytest.fixture(scope="module")
def image_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_shards=6, per_shard=7)
    return folder


@contextmanager
def loading_images(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[ImageLoader]:
    data = ImageData(train=(f"{folder}/*.tar",), streams=6)
    loader = ImageLoader(data, VIEW, 12, 0, LoaderSettings(), rank=rank, world_size=world_size)
    yield loader
    loader.close()


def test_they_are_the_images_that_pre_training_sees_at_the_same_step(image_corpus: Path) -> None:
    config = tiny_config(f"data.train=[{image_corpus}/*.tar]", "views.image_size=16", "views.global_size=16")
    pretraining = BatchLoader(config, LetterEncoder())
    with loading_images(image_corpus) as loader:
        for step in (0, 9):
            expected, found = pretraining.batch(step), loader.batch(step)
            assert found.keys == expected.keys
            assert found.images.equal(expected.images)
            assert found.step == step
    pretraining.close()


def test_the_global_batch_is_the_same_on_three_ranks_as_on_one(image_corpus: Path) -> None:
    with loading_images(image_corpus) as loader:
        whole = loader.batch(5)
    parts = []
    for rank in range(3):
        with loading_images(image_corpus, rank, 3) as loader:
            parts.append(loader.batch(5).images)
    assert torch.stack(parts, dim=1).flatten(0, 1).equal(whole.images)


def test_with_an_offset_a_step_begins_so_many_samples_later(image_corpus: Path) -> None:
    with loading_images(image_corpus) as loader:
        whole = [*loader.batch(2).keys, *loader.batch(3).keys]
        assert next(loader.iterate(4, -18)).keys == tuple(whole[6:18])


def test_iterating_starts_where_it_is_told_and_needs_no_captions(tmp_path: Path) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", {f"{i}.jpg": encoded(i) for i in range(4)})
    with loading_images(tmp_path) as loader:
        ahead = loader.iterate(3)
        first, second = next(ahead), next(ahead)
        assert (first.step, second.step) == (3, 4)
        assert first.images.equal(loader.batch(3).images)
        assert loader.wait_seconds > 0
        assert not loader.bad_samples.counts
