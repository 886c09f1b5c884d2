"""Stores of latents: what was written is read, whoever wrote it; damage is one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError
from data import storage
from data.bad_samples import StorageError
from data.corpus_directory import write_manifest
from data.latents import channel_statistics
from data.latents import store as latent_store
from data.latents.channel_statistics import ChannelSums, write_channel_statistics
from data.latents.files import list_latent_files
from data.latents.store import LatentStore, LatentWriter
from data.storage import OpenFile
from tests.data.latents.stores import random_latents, write_public_store

pytestmark = pytest.mark.L0


def write_ours(directory: Path, world_size: int, count: int = 11, batch: int = 2, shard_size: int = 3) -> Path:
    """A store of `count` images that `world_size` ranks wrote, rank r the images r, r + W, ..."""
    directory.mkdir()
    whole = random_latents(count) | {"positions": torch.arange(count)}
    tallies = []
    for rank in range(world_size):
        writer = LatentWriter(directory, rank, shard_size)
        own = {key: rows[rank::world_size] for key, rows in whole.items()}
        for start in range(0, len(own["labels"]), batch):
            writer.add(*(rows[start : start + batch] for rows in own.values()))
        tallies.append(writer.close())
    tally = sum(tallies[1:], tallies[0])
    write_channel_statistics(directory, *tally.statistics())
    write_manifest(directory, {"tokenizer": "ab12", "crop": 32}, tally.samples)
    return directory


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_ranks_wrote_is_read_in_the_order_of_the_corpus(tmp_path: Path, world_size: int) -> None:
    store, whole = LatentStore(write_ours(tmp_path / "store", world_size)), random_latents(11)
    assert (store.shape, store.num_samples, store.num_classes, store.tokenizer) == ((3, 2, 2), 11, 4, "ab12")
    asked = [10, 0, 3, 3, 7]
    latents, labels = store.read(asked, [False, True, False, True, True])
    expected = [whole["latents_flip" if flip else "latents"][i] for i, flip in zip(asked, [0, 1, 0, 1, 1], strict=True)]
    assert latents.equal(torch.stack(expected))
    assert labels.equal(whole["labels"][asked])
    assert store.labels.equal(whole["labels"])


def test_files_have_the_public_names_keys_and_sizes(tmp_path: Path) -> None:
    names = [path.name for path in list_latent_files(write_ours(tmp_path / "store", world_size=2))]
    assert names == [f"latents_rank{rank:02d}_shard{number:03d}.safetensors" for rank in (0, 1) for number in (0, 1)]
    files = [load_file(tmp_path / "store" / name) for name in names]
    assert [len(file["labels"]) for file in files] == [3, 3, 3, 2]
    assert set(files[0]) == {"latents", "latents_flip", "labels", "positions"}
    assert files[3]["latents"].shape == files[3]["latents_flip"].shape == (2, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_all_stored_values(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = {key: rows.to(dtype) for key, rows in random_latents(50).items() if key != "labels"}
    writer, other = LatentWriter(tmp_path, 0), LatentWriter(tmp_path, 1)
    for start in range(0, 50, 8):
        rows = slice(start, start + 8)
        places = torch.arange(50)[rows]
        (writer if start % 16 else other).add(whole["latents"][rows], whole["latents_flip"][rows], places, places)
    mean, std = (writer.close() + other.close()).statistics()
    values = torch.cat(list(whole.values())).double()
    # Measured 1e-16 and 4e-16; without the mirrored latents the means differ by 0.12.
    torch.testing.assert_close(mean, values.mean(dim=(0, 2, 3)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(std, values.transpose(0, 1).flatten(1).std(dim=1), rtol=1e-13, atol=1e-13)
    write_channel_statistics(tmp_path, mean, std)
    stored = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert stored["mean"].shape == stored["std"].shape == (1, 3, 1, 1)
    store = LatentStore(tmp_path)
    assert store.dtype == dtype
    assert store.mean.equal(mean.float())
    assert store.read([49], [True])[0].equal(whole["latents_flip"][49:])


@pytest.mark.parametrize("has_flips", [True, False])
def test_a_public_store_without_statistics_is_measured(
    tmp_path: Path, has_flips: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_public_store(tmp_path / "public", [300, 7])
    (store / "latents_stats.pt").unlink()
    if not has_flips:
        for path in list_latent_files(store):
            _without(path, "latents_flip")
    assert channel_statistics.main([str(store)]) == 0
    whole = random_latents(307)
    values = torch.cat([whole[key] for key in ("latents", "latents_flip")[: 1 + has_flips]]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(LatentStore(store).mean, values.mean(1))
    torch.testing.assert_close(LatentStore(store).std, values.std(1))
    for directory, expected in ((store, "exists already"), (tmp_path, "holds no latents")):
        assert channel_statistics.main([str(directory)]) == 2
        assert expected in capsys.readouterr().err


def test_a_rank_without_images_adds_nothing(tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path, 0)
    tally = writer.close() + ChannelSums()
    assert (tally.samples, tally.num_values) == ({}, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_public_store_is_read_without_a_manifest(tmp_path: Path) -> None:
    store, whole = LatentStore(write_public_store(tmp_path / "public", [4, 3])), random_latents(7)
    assert (store.tokenizer, store.notes, store.num_samples) == (None, {}, 7)
    latents, labels = store.read(range(7), [False] * 7)
    assert latents.equal(whole["latents"])
    assert labels.equal(whole["labels"])


def test_files_come_by_number_not_by_letter(tmp_path: Path) -> None:
    names = [
        "latents_rank00_shard002",
        "latents_rank00_shard1000",
        "latents_rank99_shard000",
        "latents_rank100_shard000",
    ]
    for name in reversed(names):
        (tmp_path / f"{name}.safetensors").touch()
    assert [path.stem for path in list_latent_files(tmp_path)] == names


def test_reading_rows_leaves_the_rest_on_the_disk(tmp_path: Path) -> None:
    write_public_store(tmp_path / "large", [1500], (16, 16, 16))  # 49 MB in two tensors
    store = LatentStore(tmp_path / "large")
    before = _anonymous_bytes()
    for first in range(0, 1500, 20):
        store.read(range(first, first + 4), [False] * 4)
    assert _anonymous_bytes() - before < 10e6  # a copy of one tensor takes 25 MB


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_a_store_without_mirrored_latents_gives_the_others(tmp_path: Path) -> None:
    write_public_store(tmp_path, [3])
    [path] = list_latent_files(tmp_path)
    save_file({key: rows for key, rows in load_file(path).items() if key != "latents_flip"}, path)
    store = LatentStore(tmp_path)
    assert not store.has_flips
    assert len(store.read([0, 1], [False, False])[0]) == 2
    with pytest.raises(UserError, match="holds no latents_flip: train without flips"):
        store.read([0, 1], [False, True])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _without(path: Path, key: str) -> None:
    save_file({name: rows for name, rows in load_file(path).items() if name != key}, path)


def _with(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | tensors, path)


DAMAGED = (
    "holds no statistics, is cut off, or holds more than tensors: it is a dictionary of the tensors mean and std, as "
    r"torch\.save writes one; write the store anew with `python -m evaluation\.latents`$"
)
DAMAGES = {
    "cut off": ("is no safetensors file, or is cut off", lambda store, file: _cut(file)),
    "no latents": ("has no latents", lambda store, file: _without(file, "latents")),
    "no labels": ("has no labels", lambda store, file: _without(file, "labels")),
    "fewer labels": ("with a label from 0 on for each", lambda store, file: _with(file, labels=torch.zeros(2).long())),
    "label -1": ("with a label from 0 on for each", lambda store, file: _with(file, labels=torch.full((3,), -1))),
    "unlike flips": ("both alike", lambda store, file: _with(file, latents_flip=torch.zeros(3, 4, 2, 2))),
    "unlike files": ("files of one store are alike", lambda store, file: write_unlike(file)),
    "no statistics": (
        "python -m data.latents.channel_statistics",
        lambda store, file: (store / "latents_stats.pt").unlink(),
    ),
    "cut statistics": (f"latents_stats.pt {DAMAGED}", lambda store, file: _cut(store / "latents_stats.pt")),
    "statistics with code": (
        f"latents_stats.pt {DAMAGED}",
        lambda store, file: torch.save({"mean": store, "std": store}, store / "latents_stats.pt"),
    ),
    "statistics that are a list": (
        "latents_stats.pt holds no statistics but a list: it is a dictionary of the tensors mean and std",
        lambda store, file: torch.save([0.0, 1.0], store / "latents_stats.pt"),
    ),
    "other statistics": (
        r"latents_stats.pt holds no statistics but the keys \['mean'\]: it is a dictionary of the tensors mean and std",
        lambda store, file: torch.save({"mean": torch.zeros(3)}, store / "latents_stats.pt"),
    ),
    "statistics of another width": (
        "is for 8 channels, the latents beside it have 3",
        lambda store, file: write_channel_statistics(store, torch.zeros(8), torch.ones(8)),
    ),
    "a dead channel": (
        "channel 1 has mean 0 and deviation 0",
        lambda store, file: write_channel_statistics(store, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])),
    ),
    "damaged manifest": ("is not a manifest", lambda store, file: (store / "manifest.json").write_text("[]")),
    "a file the manifest lists is gone": (
        "is missing or cut short, by manifest.json",
        lambda store, file: write_json_with_a_lost_file(store),
    ),
}


def write_unlike(file: Path) -> None:
    save_file(random_latents(3, (4, 2, 2)), file)


def write_json_with_a_lost_file(store: Path) -> None:
    text = json.dumps({"arguments": {}, "shards": {"latents_rank01_shard000.safetensors": {"bytes": 5}}})
    (store / "manifest.json").write_text(text)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(tmp_path: Path, name: str) -> None:
    expected, damage = DAMAGES[name]
    store = write_public_store(tmp_path / "store", [4, 3])
    damage(store, list_latent_files(store)[1])
    with pytest.raises(UserError, match=expected):
        LatentStore(store)


def test_an_empty_directory_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no latents .*`python -m evaluation\.latents RUN"):
        LatentStore(tmp_path)


class _Unsteady:
    """A file that fails `times` reads."""

    def __init__(self, times: int) -> None:
        self.times, self.read_well = times, OpenFile.read

    def read(self, file: OpenFile, num_bytes: int, offset: int) -> bytes:
        self.times -= 1
        if self.times >= 0:
            raise OSError(5, "Input/output error")
        return self.read_well(file, num_bytes, offset)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentStore:
    """A store that is being read, one file of which is open; no time is spent on waiting for storage."""
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(latent_store, "_OPEN_FILES", 1)
    store = LatentStore(write_public_store(tmp_path / "store", [4, 3]), tries=3)
    store.read([0, 1], [False, True])
    return store


CHANGES = {
    "cut off": (r"shard001.*it ends at byte [\d,]+ where [\d,]+ are needed", lambda file: os.truncate(file, 200)),
    "emptied": (r"shard001.*it ends at byte 0 where 8 are needed", lambda file: os.truncate(file, 0)),
    "gone": (r"shard001.*is gone since the start", lambda file: file.unlink()),
    "another": (r"shard001.*it holds \(3, 4, 2, 2\)", lambda file: write_unlike(file)),
    "of another type": (r"shard001.*another type", lambda file: write_halves(file)),
    "no header": (r"shard001.*its header is unreadable", lambda file: file.write_bytes(bytes([2]) + bytes(200))),
}


def write_halves(file: Path) -> None:
    save_file({key: rows.half() if rows.ndim == 4 else rows for key, rows in load_file(file).items()}, file)


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_under_a_run_is_one_clear_error(opened: LatentStore, name: str) -> None:
    expected, change = CHANGES[name]
    change(list_latent_files(opened.directory)[1])
    with pytest.raises(UserError, match=expected):
        opened.read([6], [True])


def test_an_open_file_is_read_on_when_it_is_unlinked_and_told_when_it_is_cut_off(opened: LatentStore) -> None:
    """Through a map, the second would have ended this process."""
    expected, file = random_latents(7)["latents_flip"], list_latent_files(opened.directory)[0]
    os.link(file, file.with_suffix(".kept"))
    file.unlink()
    assert opened.read([2], [True])[0].equal(expected[2:3])
    os.truncate(file.with_suffix(".kept"), 200)
    with pytest.raises(UserError, match=r"shard000.*it ends at byte [\d,]+ where [\d,]+ are needed"):
        opened.read([2], [True])


def test_storage_that_fails_for_a_while_changes_nothing(opened: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = _Unsteady(2)
    monkeypatch.setattr(OpenFile, "read", lambda *asked: unsteady.read(*asked))
    assert opened.read([5], [False])[0].equal(random_latents(7)["latents"][5:6])
    unsteady.times = 3
    with pytest.raises(StorageError, match=r"shard000.*Input/output error.*tried system\.loader\.tries=3 times"):
        opened.read([0], [False])
