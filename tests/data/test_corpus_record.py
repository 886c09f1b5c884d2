"""A run that goes on has the order it had, whatever was added to its corpus or has vanished from it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from configs import UserError
from data.order import CorpusRecord, read_corpus_record, write_corpus_record
from data.sample_reader import SampleReader
from tests.data.tar_shards import encoded, write_corpus, write_tar
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

STEPS = range(20)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 0.0)


def reader_of(folder: Path, is_resumed: bool = False, **options: object) -> SampleReader:
    config = tiny_config(f"data.train=[{folder}/*.tar]", "data.max_bad_share=0.3", "data.streams=2")
    data, settings = config.data, config.system.loader
    return SampleReader(
        data, settings, config.seed, "txt", corpus_file=folder / "run" / "corpus.json", is_resumed=is_resumed, **options
    )  # type: ignore[arg-type]


def keys_of(reader: SampleReader, steps: range = STEPS) -> list[tuple[str, ...]]:
    try:
        return [tuple(row.sample.key for row in reader.rows(reader.positions(step, 12))) for step in steps]
    finally:
        reader.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path, num_shards=8, per_shard=9, height=16, width=16)
    write_tar(tmp_path / "00008.tar", {"a.jpg": encoded(0), "a.txt": b"a", "b.jpg": encoded(1)})
    return tmp_path


def test_shards_added_since_the_start_change_nothing_of_a_run_that_goes_on(folder: Path) -> None:
    first = reader_of(folder)
    before = keys_of(first)
    write_tar(folder / "00003b.tar", {"new.jpg": encoded(0), "new.txt": b"new"})
    resumed = reader_of(folder, is_resumed=True)
    assert resumed.bad_samples.counts == first.bad_samples.counts == {"missing caption": 1}
    assert keys_of(resumed, range(7, 20)) == before[7:]
    assert keys_of(reader_of(folder)) != before  # a new run sees the new shard, and writes it down
    assert len(json.loads((folder / "run" / "corpus.json").read_text())["shards"]) == 10


def test_a_shard_that_vanished_while_the_run_was_down_is_skipped_and_counted(folder: Path) -> None:
    before = keys_of(reader_of(folder))
    (folder / "00002.tar").unlink()
    resumed = reader_of(folder, is_resumed=True)
    after = keys_of(resumed)
    for was, now in zip(sum(before, ()), sum(after, ()), strict=True):
        assert was == now or was.startswith("00002/")
    assert set(resumed.bad_samples.counts) == {"missing caption", "vanished shard"}


def test_without_the_file_or_with_another_corpus_the_shards_are_looked_at_anew(folder: Path) -> None:
    path = folder / "run" / "corpus.json"
    train, found = ("a/*.tar",), CorpusRecord({"a/0.tar": 3, "a/1.tar": 0}, Counter({"empty image": 2}))
    write_corpus_record(path, train, "txt", found)
    known = read_corpus_record(path, train, "txt")
    assert known is not None
    assert known[0] == found
    assert read_corpus_record(path, ("b/*.tar",), "txt") is None
    assert read_corpus_record(path, train, "json:alt") is None
    for damaged in (b"", b"[]", b"{", b'{"of": 3}', path.read_bytes().replace(b": 3", b': "x"')):
        path.write_bytes(damaged)
        assert read_corpus_record(path, train, "txt") is None
    path.unlink()
    assert keys_of(reader_of(folder, is_resumed=True)) == keys_of(reader_of(folder))


class TwoRanks:
    """An gather_objects with another rank that first tells `mark`, or what this rank tells, and later nothing."""

    def __init__(self, mark: object) -> None:
        self.mark, self.num_asked = mark, 0

    def __call__(self, own: object) -> list[object]:
        self.num_asked += 1
        return [own, own if self.mark is SAME else self.mark] if self.num_asked == 1 else [own]


SAME = object()


@pytest.mark.parametrize(("mark", "num_asked"), [(SAME, 1), (None, 3), (7, 3)])
def test_ranks_that_do_not_all_read_the_same_open_the_corpus_together(
    folder: Path, mark: object, num_asked: int
) -> None:
    keys_of(reader_of(folder), range(1))
    gather_objects = TwoRanks(mark)
    keys_of(reader_of(folder, is_resumed=True, gather_objects=gather_objects), range(1))
    assert (
        gather_objects.num_asked == num_asked
    )  # then the parts that each has opened, and whether they are written down


def test_a_run_that_cannot_write_down_its_corpus_does_not_begin(folder: Path) -> None:
    (folder / "run").write_text("a file in the directory's place")

    def gather_objects(own: object) -> list[object]:
        return ["told by rank 0" if own == "" else ([9, 9, 9, 9, 1], Counter()), own]

    with pytest.raises(UserError, match=r"run/corpus\.json cannot be written \(File exists\): .*system\.run_dir"):
        reader_of(folder)
    with pytest.raises(UserError, match="told by rank 0"):
        reader_of(folder, rank=1, world_size=2, gather_objects=gather_objects)
