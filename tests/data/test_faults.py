"""Under a storage that is slow, fails, loses shards or has them replaced, batches stay full and of the same samples."""

import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import Config, UserError
from data import tar_index
from data.bad_samples import WHOLE_SHARD, StorageError, TooManyBadSamples, UnreadableLog
from data.loader import BatchLoader
from data.order import SampleLocation
from data.sample_reader import SampleReader
from data.storage import OpenFile, ShardStorage, StorageRetries, Unreadable, wait_seconds
from tests.data.faulty_storage import Outage, Schedule, faults
from tests.data.tar_shards import LetterEncoder, encoded, write_corpus, write_tar
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

STEPS = 40  # 480 positions: over three epochs of 12 shards of 12 samples
LOST = "00004.tar"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_shards=12, per_shard=12, height=16, width=16)
    return folder


def config_for(folder: Path, *overrides: str) -> Config:
    sizes = ("views.image_size=16", "views.global_size=16", "views.local_size=8", "data.max_bad_share=0.1")
    return tiny_config(f"data.train=[{folder}/*.tar]", *sizes, *overrides)


def reader_of(folder: Path, *overrides: str, **options: object) -> SampleReader:
    config = config_for(folder, *overrides)
    return SampleReader(config.data, config.system.loader, config.seed, "txt", **options)  # type: ignore[arg-type]


def keys_of(reader: SampleReader, steps: range = range(STEPS)) -> list[tuple[str, ...]]:
    """What each step serves; the reader is closed."""
    try:
        return [tuple(row.sample.key for row in reader.rows(reader.positions(step, 12))) for step in steps]
    finally:
        reader.close()


def own_keys(reader: SampleReader) -> Iterator[tuple[int, int, str]]:
    """(position, epoch, key) of every position's own sample."""
    for position in range(STEPS * 12):
        place = reader.order.locate(position)
        yield position, place.epoch, reader.shards.key(place.shard_idx, place.sample_idx)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> list[tuple[str, ...]]:
    return keys_of(reader_of(corpus))


# --- trouble that passes


def test_a_slow_storage_that_fails_now_and_then_changes_nothing(
    corpus: Path, undisturbed: list[tuple[str, ...]]
) -> None:
    with faults(Schedule(seed=3, errors=0.1, cuts=0.02, latency_seconds=0.0005)) as storage:
        reader = reader_of(corpus, "system.loader.tries=20")
        assert keys_of(reader) == undisturbed
    assert storage.num_faults > 50
    assert reader.bad_samples.counts == {}
    assert reader.unreadable.records() == []


def test_waits_double_up_to_a_minute_and_end_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 1.0)
    assert [wait_seconds(tried) for tried in (1, 2, 3, 4, 5, 7, 8)] == [1, 2, 4, 8, 16, 60, 60]
    assert sum(map(wait_seconds, range(1, 6))) == 31
    retries, tried = StorageRetries(tries=6), []

    def fails() -> None:
        tried.append(1)
        retries.stop()  # as a stop signal would, while this waits
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        retries(fails)
    assert len(tried) == 1


def test_what_is_tried_is_tried_so_often_and_no_oftener() -> None:
    tried: list[int] = []

    def fails() -> None:
        tried.append(1)
        raise (FileNotFoundError if len(tried) > 3 else OSError)

    with pytest.raises(OSError, match=r"^$"):
        StorageRetries(tries=3)(fails)
    assert len(tried) == 3
    with pytest.raises(FileNotFoundError):
        StorageRetries(tries=3)(fails, permanent=(FileNotFoundError,))
    assert len(tried) == 4


# --- shards that go


def test_a_vanished_shard_costs_its_samples_alone_and_each_is_named(corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "bad_samples.jsonl"
    with faults(Schedule(outages=(Outage(LOST, first=9),))):
        reader = reader_of(corpus, bad_log=log)
        served = [key for keys in keys_of(reader) for key in keys]
        own = list(own_keys(reader))
    for position, _, key in own:
        assert served[position] == key or key.startswith("00004/")
    skipped = {key for position, _, key in own if served[position] != key}
    assert 4 <= len(skipped) <= 12
    assert reader.bad_samples.counts == {"vanished shard": len(skipped)}
    assert reader.bad_samples.share == pytest.approx(1 / 12)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert {record["key"] for record in records} == skipped
    assert {record["reason"] for record in records} == {"vanished shard"}


def test_a_shard_is_tried_again_in_the_next_epoch(corpus: Path) -> None:
    with faults(Schedule(outages=(Outage(LOST, first=9, last=14),))) as storage:  # 6 tries, all in vain
        reader = reader_of(corpus)
        served = [key for keys in keys_of(reader) for key in keys]
        own = list(own_keys(reader))
    by_epoch = Counter(epoch for position, epoch, key in own if served[position] != key)
    assert set(by_epoch) == {0}
    assert storage.requests[str(corpus / LOST)] > 40


def test_a_lost_shard_costs_one_row_of_tries_an_epoch(corpus: Path) -> None:
    with faults(Schedule(outages=(Outage(LOST),))) as storage:
        keys_of(reader_of(corpus, "system.loader.threads=1"))
        epochs = STEPS * 12 // 144 + 1
        assert storage.requests[str(corpus / LOST)] <= epochs * (6 + 1)  # and one look whether it opens


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_that_goes_on_skips_what_it_skipped_before(corpus: Path, tmp_path: Path, world_size: int) -> None:
    """What was lost before its first position: what came after is tried again."""
    file = tmp_path / "corpus.json"
    with faults(Schedule(outages=(Outage(LOST, first=9, last=14),))):
        reader = reader_of(corpus, corpus_file=file)
        reader.unreadable.start_at(0)
        whole = keys_of(reader)
    [(position, *_)] = reader.unreadable.records()
    cursor = position // 12 + 1
    later = []
    for rank in range(world_size):  # the storage is well again
        resumed = reader_of(
            corpus,
            corpus_file=file,
            is_resumed=True,
            rank=rank,
            world_size=world_size,
            gather_objects=lambda own: [own],
        )
        resumed.unreadable.start_at(cursor * 12)
        assert [loss.sample_idx for loss in resumed.unreadable.records()] == [WHOLE_SHARD]
        later.append(keys_of(resumed, range(cursor, STEPS)))
    for step, ranks in enumerate(zip(*later, strict=True), start=cursor):
        assert tuple(ranks[i % world_size][i // world_size] for i in range(12)) == whole[step]
    rolled_back = reader_of(corpus, corpus_file=file, is_resumed=True)
    rolled_back.unreadable.start_at(position)
    assert rolled_back.unreadable.records() == []
    rolled_back.close()
    forward = reader_of(corpus, corpus_file=file, is_resumed=True)  # that session served the shard: so does this one
    forward.unreadable.start_at(cursor * 12 + 120)
    assert forward.unreadable.records() == []
    forward.close()


def test_sessions_are_told_apart_whatever_order_their_lines_are_in(tmp_path: Path) -> None:
    path = tmp_path / "lost_shards.jsonl"
    lines = [
        {
            "session": 2,
            "loss": [60, 0, 2, WHOLE_SHARD, "vanished shard"],
        },  # of another rank, before the first one's line
        {"session": 1, "start": 0},
        {"session": 1, "loss": [40, 0, 1, WHOLE_SHARD, "vanished shard"]},
        {"session": 1, "loss": [70, 0, 3, WHOLE_SHARD, "vanished shard"]},  # thrown away: the next began at 50
        {"session": 2, "start": 50},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"session": 2, "loss": [80')
    assert [loss.position for loss in UnreadableLog(path, rank=1).start_session(100)] == [60, 40]
    assert [loss.position for loss in UnreadableLog(path, rank=1).start_session(55)] == [40]
    assert [loss.position for loss in UnreadableLog(path, rank=1).start_session(0)] == []
    UnreadableLog(path, rank=0).start_session(50)  # after half a line
    assert [loss.position for loss in UnreadableLog(path, rank=1).start_session(100)] == [40]


def test_a_loader_begins_where_it_iterates_and_forgets_what_lay_ahead(corpus: Path, tmp_path: Path) -> None:
    loader = BatchLoader(config_for(corpus), LetterEncoder(), corpus_file=tmp_path / "corpus.json")
    losses = loader.reader.unreadable
    for step in (3, 1):
        next(loader.iterate(step))
        assert losses.records() == []
        losses.add(SampleLocation(0, 4, 0), 2 * 12, Unreadable("vanished shard", is_whole_shard=True))
    loader.iterate(1)
    assert losses.records() == []
    loader.close()
    starts = [json.loads(line).get("start") for line in (tmp_path / "lost_shards.jsonl").read_text().splitlines()]
    assert starts == [36, None, 12, None, 12]


class Scratched:
    """A shard in which the bytes at some offsets cannot be read."""

    def __init__(self, inner: OpenFile, offsets: set[int]) -> None:
        self.inner, self.offsets = inner, offsets

    def read(self, num_bytes: int, offset: int) -> bytes:
        if any(offset <= place < offset + num_bytes for place in self.offsets):
            raise OSError(errno.EIO, "unreadable sector")
        return self.inner.read(num_bytes, offset)


@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_bad_sector_costs_its_sample_and_a_second_one_the_shard(
    corpus: Path, num_bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: set[int] = set()
    opened = ShardStorage.open
    monkeypatch.setattr(
        ShardStorage, "open", lambda disk, name: Scratched(opened(disk, name), offsets if LOST in name else set())
    )
    reader = reader_of(corpus)
    offsets |= {reader.shards.index(4).members(sample_idx)[0].offset for sample_idx in (7, 2)[:num_bad]}
    keys_of(reader)
    losses = reader.unreadable.records()
    epochs = {loss.epoch for loss in losses}
    assert len(epochs) >= 3
    assert {loss.reason for loss in losses} == {"storage error"}
    assert {loss.sample_idx for loss in losses} - {2, 7} == ({WHOLE_SHARD} if num_bad == 2 else set())
    assert (reader.bad_samples.counts["storage error"] > 1) == (num_bad == 2)


def test_an_outage_ends_the_run_with_one_error(corpus: Path) -> None:
    with faults(Schedule(outages=(Outage("", error=errno.ETIMEDOUT),))):
        reader = reader_of(corpus, "data.max_bad_share=1.0", "data.streams=1", "data.block_shards=12")
        with pytest.raises(StorageError, match=r"8 shards in a row .*Connection timed out: .*\.tar'; .*--resume"):
            keys_of(reader)
    with faults(
        Schedule(outages=(Outage("", first=9, error=errno.ETIMEDOUT),))
    ):  # streams of two shards each are at their end before that
        reader = reader_of(corpus, "data.max_bad_share=1.0", "system.loader.threads=1")
        with pytest.raises(StorageError, match=r"8 shards in a row|no readable sample among 1000 .*storage error"):
            keys_of(reader)


def test_more_lost_than_the_share_allows_ends_the_run(corpus: Path) -> None:
    with faults(Schedule(outages=(Outage(LOST, first=9),))):
        reader = reader_of(corpus, "data.max_bad_share=0.05")
        with pytest.raises(TooManyBadSamples, match=r"8\.3% of the samples are bad .*vanished shard"):
            keys_of(reader)


def test_a_loader_closes_while_it_waits_for_storage(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 50.0)
    with faults(Schedule(outages=(Outage("", error=errno.EIO),))) as storage:
        loader = BatchLoader(config_for(corpus), LetterEncoder())
        loader.iterate()
        while not storage.num_faults:
            time.sleep(0.01)
        closing = threading.Thread(target=loader.close)
        closing.start()
        closing.join(timeout=30)
        assert not closing.is_alive()


def test_a_corpus_without_a_sample_is_refused_with_a_summary(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(".DS_Store", b"x")])
    with pytest.raises(
        UserError, match=r"data\.train holds no sample \(1 shard, 0 samples; no sample in 1 shard: .*a\.tar"
    ):
        reader_of(tmp_path)


# --- shards that change, on a real disk


@pytest.mark.parametrize("change", ["cut", "deleted", "emptied", "no tar", "a pipe", "a folder", "replaced", "touched"])
def test_a_shard_that_changes_under_the_run_costs_what_is_gone_of_it(tmp_path: Path, change: str) -> None:
    write_corpus(tmp_path, num_shards=12, per_shard=12, height=16, width=16)
    reader, tar = reader_of(tmp_path, "data.max_bad_share=1.0"), tmp_path / LOST
    reader.shards._files._size = 1  # as with thousands of shards: files are closed and opened again
    for step in range(3):
        reader.rows(reader.positions(step, 12))
    if change == "cut":
        os.truncate(tar, tar.stat().st_size // 2)
    elif change == "emptied":
        os.truncate(tar, 0)
    elif change == "no tar":
        tar.write_bytes(b"<html>" * 5000)
    elif change == "touched":
        os.utime(tar)
    else:
        tar.unlink()
    if change == "a pipe":
        os.mkfifo(tar)
    elif change == "a folder":
        tar.mkdir()
    elif change == "replaced":
        write_tar(
            tar, {f"new{i}.{ext}": encoded(i) if ext == "jpg" else b"new" for i in range(5) for ext in ("jpg", "txt")}
        )
    served = [key for keys in keys_of(reader, range(3, STEPS)) for key in keys]
    assert len(served) == (STEPS - 3) * 12
    later = {key for key in served[200:] if key.startswith("00004/")}  # from the second epoch on
    reasons = set(reader.bad_samples.counts)
    if change == "touched":
        assert (len(later), reasons) == (12, set())
    elif change == "cut":
        assert 4 <= len(later) <= 8
        assert reasons == {"changed shard"}
    elif change == "replaced":
        assert later == {f"00004/new{i}" for i in range(5)}
        assert reasons == {"changed shard"}
    else:
        assert not later
        assert reasons <= {"vanished shard", "storage error", "changed shard"}
        assert reasons


def recaptioned(tar: Path, age_seconds: int) -> None:
    """Copies other captions over the shard, as `cp -a` of a tar does: of the same size, and with a time of its own."""
    old = tar.stat()
    first, last = (int(number) for number in (tar.stem, int(tar.stem) + 1))
    members: list[tuple[str, bytes | str]] = []
    for i in range(first * 12, last * 12):
        caption = (f"{i:06d}.txt", b"a caption that is longer %d" % i)
        members += [caption, (f"{i:06d}.jpg", encoded(i, height=16, width=16)), (f"{i:06d}.json", b"{}")]
    write_tar(tar, members)
    assert tar.stat().st_size == old.st_size
    os.utime(tar, ns=(old.st_atime_ns, old.st_mtime_ns - age_seconds * 10**9))


@pytest.mark.parametrize("age_seconds", [0, 3600])
@pytest.mark.parametrize("is_met", ["at the start", "by the run"])
def test_a_recaptioned_shard_of_the_same_size_and_no_later_time_is_indexed_anew_once(
    tmp_path: Path, age_seconds: int, is_met: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path, num_shards=12, per_shard=12, height=16, width=16)
    undisturbed = keys_of(reader_of(tmp_path))  # writes the indexes
    scanned: list[str] = []
    scan_tar = tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda tar: scanned.append(tar.name) or scan_tar(tar))
    if is_met == "at the start":
        recaptioned(tmp_path / LOST, age_seconds)
    reader = reader_of(tmp_path)
    for step in range(6):
        reader.rows(reader.positions(step, 12))
    if is_met == "by the run":
        recaptioned(tmp_path / LOST, age_seconds)
        reader.shards._files.drop(4)
    rows = [row for step in range(STEPS) for row in reader.rows(reader.positions(step, 12))]
    assert [row.sample.key for row in rows] == [key for keys in undisturbed for key in keys]
    captions = {row.sample.caption for row in rows if row.sample.key.startswith("00004/")}
    assert captions == {f"a caption that is longer {i}" for i in range(48, 60)}
    assert (reader.bad_samples.counts, scanned) == ({}, [LOST])
    reader.close()
    assert keys_of(reader_of(tmp_path)) == undisturbed
    assert scanned == [LOST]
