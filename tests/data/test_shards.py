"""Shards as webdataset and img2dataset write them are indexed once and read at random; bad ones are named."""

import errno
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs import UserError
from data import tar_index
from data.shards import BadMember, Shards, main
from data.storage import expand_patterns
from tests.data.tar_shards import encoded, index_of, write_corpus, write_tar

pytestmark = pytest.mark.L0


def refuse_writing(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> list[Path]:
    """Make directories read-only, for root too; return the list of writes tried there."""
    tried: list[Path] = []
    write = tar_index.write_atomic

    def refused(target: Path, content: bytes, is_synced: bool) -> None:
        if target.parent in folders:
            tried.append(target)
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        write(target, content, is_synced)

    monkeypatch.setattr(tar_index, "write_atomic", refused)
    return tried


def open_one(tar: Path, caption: str | None = "txt") -> Shards:
    return Shards([str(tar)], caption)


def test_an_img2dataset_shard_is_read_as_it_is(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=2, per_shard=3)
    shards = Shards(expand_patterns([str(tmp_path)]), "txt")
    assert shards.sizes.tolist() == [3, 3]
    assert not shards.bad
    sample = shards.read(1, 2)
    assert (sample.key, sample.image, sample.caption) == ("00001/000005", encoded(5), "sample 5")
    assert shards.label(1, 2) == 0


def test_captions_come_from_a_json_field_when_told_so(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=2)
    assert open_one(tmp_path / "00000.tar", "json:alt").read(0, 1).caption == "json 1"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{}", "missing caption"),
        (b'{"alt": " "}', "empty caption"),
        (b"{", "corrupt json"),
        (b"[]", "missing caption"),
    ],
)
def test_a_json_caption_that_cannot_be_read_says_why(tmp_path: Path, record: bytes, reason: str) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": encoded(0), "0.json": record})
    with pytest.raises(BadMember, match=reason):
        open_one(tar, "json:alt").read(0, 0)


def test_without_captions_every_image_counts(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": encoded(0), "1.jpg": encoded(1), "1.txt": b"one"})
    assert open_one(tar, None).sizes.tolist() == [2]
    assert open_one(tar, None).read(0, 0).caption == ""
    assert open_one(tar).bad == {"missing caption": 1}


def test_every_bad_member_is_left_out_under_its_reason(tmp_path: Path) -> None:
    good, text = encoded(0), b"words"
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("good.jpg", good), ("good.txt", text),
            ("nocaption.jpg", good),
            ("blank.jpg", good), ("blank.txt", b""),
            ("noimage.txt", text),
            ("empty.jpg", b""), ("empty.txt", text),
            ("film.mp4", good), ("film.txt", text),
            ("link.jpg", "good.jpg"), ("link.txt", text),
            ("textlink.jpg", good), ("textlink.txt", "good.txt"),
            ("../up.jpg", good), ("../up.txt", text),
            ("/root.jpg", good), ("/root.txt", text),
            ("twice.jpg", good), ("twice.txt", text), ("twice.jpg", good), ("twice.txt", text),
            ("good.jpg", good), ("good.txt", text),
            (".hidden.jpg", good), (".hidden.txt", text), (".jpg", good), (".DS_Store", text), ("._good.jpg", text),
            ("./plain/dotted.seg.1.png", good), ("./plain/dotted.jpg", good), ("./plain/dotted.txt", text),
        ],
    )  # fmt: skip
    shards = open_one(tar)
    keys = [shards.read(0, i).key for i in range(len(shards.index(0)))]
    assert keys == ["a/good", "a/twice", "a/plain/dotted"]
    assert shards.bad == {
        "missing caption": 1, "empty caption": 1, "missing image": 1, "empty image": 1,
        "unsupported image type": 1,
        "wrong member type": 2, "unsafe member name": 2, "duplicate key": 2, "hidden member name": 2,
    }  # fmt: skip
    assert Counter(reason for _, reason in shards.index(0).bad) == shards.bad


def test_directories_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        (tmp_path / "0.jpg").write_bytes(encoded(0))
        tar.add(tmp_path / "0.jpg", "part/0.jpg")
    assert open_one(tmp_path / "a.tar", None).sizes.tolist() == [1]
    assert not open_one(tmp_path / "a.tar", None).bad


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.93])
def test_a_truncated_tar_keeps_what_is_whole_and_counts_the_break(tmp_path: Path, kept: float) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=8)
    tar = tmp_path / "00000.tar"
    whole = open_one(tar)
    ends = [max(m.offset + m.size for m in whole.index(0).members(i)) for i in range(8)]
    cut = int(ends[-1] * kept)
    os.truncate(tar, cut)
    shards = open_one(tar)
    assert shards.bad == {"truncated tar": 1}
    # the last sample before the break is left out when it cannot be told from one that lost a member
    assert 0 <= sum(end < cut for end in ends) - shards.sizes[0] <= 1
    assert shards.read(0, 0) == whole.read(0, 0)


def test_an_empty_file_is_a_truncated_tar_and_another_format_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    empty = open_one(tmp_path / "empty.tar")
    assert empty.bad == {"truncated tar": 1}
    assert empty.summary(empty.bad) == (
        f"1 shard, 0 samples; 1 left out: 1 truncated tar; no sample in 1 shard: {tmp_path}/empty.tar"
    )
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(UserError, match=r"page\.tar is not an uncompressed tar file"):
        open_one(tmp_path / "page.tar")


def test_a_sidecar_is_reused_until_the_tar_changes(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=3)
    tar = tmp_path / "00000.tar"
    path = index_of(tar)
    written = path.stat().st_mtime_ns
    assert index_of(tar).stat().st_mtime_ns == written
    write_corpus(tmp_path, num_shards=1, per_shard=20)
    os.utime(tar, ns=(written - 10**9, written - 10**9))  # older than the sidecar, but of another size
    assert open_one(tar).sizes.tolist() == [20]
    os.utime(tar, ns=(written + 10**12, written + 10**12))
    assert tar_index.read_trailer(path, tar) is None


def test_an_unwritable_shard_directory_puts_the_sidecar_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=2)
    refuse_writing(monkeypatch, tmp_path)
    shards = Shards([str(tmp_path / "00000.tar")], "txt", tmp_path / "cache")
    assert not (tmp_path / "00000.idx").exists()
    assert len(list((tmp_path / "cache").glob("*.idx"))) == 1
    assert shards.read(0, 1).caption == "sample 1"


def test_an_index_without_a_writable_directory_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    write_corpus(corpus, num_shards=3, per_shard=2)
    before = sorted(corpus.iterdir())
    tried = refuse_writing(monkeypatch, corpus, cache)
    shards = Shards(expand_patterns([str(corpus)]), "txt", cache, open_indexes=1, tries=6)
    for _ in range(2):  # indexes are dropped and read again from memory
        assert [shards.read(i, 1).caption for i in range(3)] == ["sample 1", "sample 3", "sample 5"]
    assert len(tried) == 6  # each shard once in either place
    assert shards.index_folder(0) is None
    assert "3 shards, 6 samples; 3 indexes in memory only" in shards.summary(shards.bad)
    assert sorted(corpus.iterdir()) == before
    write_tar(corpus / "00001.tar", {"new.jpg": encoded(9), "new.txt": b"new"})
    shards._indexes._loaded.drop(1)
    assert shards.read(1, 0).caption == "new"


def test_indexes_beyond_the_memory_limit_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, num_shards=3, per_shard=2)
    refuse_writing(monkeypatch, tmp_path, tmp_path / "cache")
    monkeypatch.setattr("data.tar_index._MAX_PACKED_BYTES", 0)
    shards = Shards(expand_patterns([str(tmp_path)]), "txt", tmp_path / "cache", open_indexes=1)
    assert [shards.read(i, 0).caption for i in (2, 0, 1, 2)] == ["sample 4", "sample 0", "sample 2", "sample 4"]
    assert shards.summary(shards.bad).startswith("3 shards, 6 samples; 1 index in memory only: ")


@pytest.mark.parametrize("home", ["/dev/null/home", "", "~"])
def test_a_missing_home_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=2)
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    refuse_writing(monkeypatch, tmp_path)
    assert Shards([str(tmp_path / "00000.tar")], "txt").read(0, 1).caption == "sample 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar"]


def test_a_damaged_index_that_cannot_be_replaced_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=3)
    path = index_of(tmp_path / "00000.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[:10] + b"?" + whole[11:])  # its last line is whole
    refuse_writing(monkeypatch, tmp_path)
    shards = Shards([str(tmp_path / "00000.tar")], "txt", tmp_path / "cache")
    for _ in range(2):
        assert shards.read(0, 2).caption == "sample 2"
        shards._indexes._loaded.drop(0)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_index_command_takes_a_cache_directory_and_names_where_indexes_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    write_corpus(corpus, num_shards=2, per_shard=2)
    refuse_writing(monkeypatch, corpus)
    assert main(["index", str(corpus), "--processes", "1", "--cache-dir", str(cache)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["2 shards, 4 samples", f"2 indexes in {cache}"]
    assert len(list(cache.glob("*.idx"))) == 2
    monkeypatch.setenv("HOME", "/dev/null")
    assert main(["index", str(corpus), "--processes", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 indexes not kept: ")


def test_names_with_spaces_signs_and_raw_bytes_survive_the_sidecar(tmp_path: Path) -> None:
    names = ["my photo", "100%25", "été", b"raw\xff".decode(errors="surrogateescape")]
    tar = write_tar(tmp_path / "a.tar", {f"{name}.jpg": encoded(i) for i, name in enumerate(names)})
    shards = open_one(tar, None)
    assert [shards.index(0).key(i) for i in range(4)] == [f"a/{name}" for name in names]
    assert shards.read(0, 3).image == encoded(3)


def test_dali_reads_the_sidecar_with_its_own_reader(tmp_path: Path) -> None:
    from nvidia.dali.experimental import dynamic as dali

    write_corpus(tmp_path, num_shards=1, per_shard=4)
    tar = tmp_path / "00000.tar"
    path = index_of(tar)
    reader = dali.readers.Webdataset(paths=[str(tar)], index_paths=[str(path)], ext=["jpg", "txt"])
    read = [bytes(bytearray(text.cpu().torch().numpy())) for _, text in reader.next_epoch()]
    assert read == [b"sample %d" % i for i in range(4)]


def test_the_sidecar_lists_what_dalis_tool_lists(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=4)
    tar = tmp_path / "00000.tar"
    path = index_of(tar)
    subprocess.run([sys.executable, "-m", "wds2idx", str(tar), str(tmp_path / "theirs.idx")], check=True, timeout=60)
    assert path.read_text().splitlines()[:-1] == (tmp_path / "theirs.idx").read_text().splitlines()


def test_many_threads_read_many_shards_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards._OPEN_FILES", 3)
    write_corpus(tmp_path, num_shards=8, per_shard=4)
    shards = Shards(expand_patterns([str(tmp_path)]), "txt", open_indexes=2)
    places = [(shard, i) for i in range(4) for shard in range(8)] * 5
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(lambda place: shards.read(*place), places))
    assert [s.caption for s in samples] == [f"sample {shard * 4 + i}" for shard, i in places]
    held = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)]
    assert sum(name.startswith(str(tmp_path)) for name in held) == 3


def test_shards_of_one_name_in_two_directories_have_different_keys(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder, num_shards=1, per_shard=1)
    shards = Shards(expand_patterns([str(tmp_path / "*" / "*.tar")]), "txt")
    assert [shards.read(i, 0).key for i in range(2)] == ["a/00000/000000", "b/00000/000000"]


def test_the_index_command_prints_counts_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=2)
    write_tar(tmp_path / "00001.tar", {"0.jpg": encoded(0), "1.jpg": encoded(1), "1.txt": b"one"})
    assert main(["index", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "indexing 2 shards, 2 at once"
    assert lines[1].endswith("00000.tar: 2 samples")
    assert lines[2].endswith("00001.tar: 1 sample; 1 left out: 1 missing caption")
    assert lines[3:] == ["2 shards, 3 samples; 1 left out: 1 missing caption"]
    assert (tmp_path / "00001.idx").exists()


def test_the_index_command_answers_a_wrong_directory_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.shards", "index", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_index_command_continues_after_a_file_that_is_not_a_tar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path, num_shards=2, per_shard=2)
    (tmp_path / "00000.tar").write_bytes(b"<html>" * 1000)
    assert main(["index", str(tmp_path), "--processes", "1"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {tmp_path}/00000.tar is not an uncompressed tar file")
    assert len(told.err.splitlines()) == 1
    assert told.out.splitlines()[-1] == "1 shard, 2 samples"


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def opened_by_ranks(names: list[str], world_size: int) -> list[Shards | UserError]:
    """What each of several ranks, here threads, gets when they open a corpus together."""
    told: list[object] = [None] * world_size
    everyone = threading.Barrier(world_size)

    def open_as(rank: int) -> Shards | UserError:
        def gather_objects(own: object) -> list[object]:
            told[rank] = own
            everyone.wait(timeout=30)
            return list(told)

        try:
            return Shards(names, "txt", rank=rank, world_size=world_size, gather_objects=gather_objects)
        except UserError as error:
            return error

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(open_as, range(world_size)))


def test_ranks_that_exchange_counts_open_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        members = {
            f"{i}.{ext}": encoded(i) if ext == "jpg" else b"x" for i in range(1 + number) for ext in ("jpg", "txt")
        }
        write_tar(tmp_path / f"{number}.tar", {**members, "bad.jpg": encoded(0)})
    names = expand_patterns([str(tmp_path)])
    alone = Shards(names, "txt")
    counted: Counter[int] = Counter()
    count = Shards._count
    monkeypatch.setattr(Shards, "_count", lambda shards, idx: counted.update([idx]) or count(shards, idx))
    for found in opened_by_ranks(names, world_size=3):
        assert isinstance(found, Shards)
        assert found.sizes.tolist() == alone.sizes.tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert found.bad == alone.bad == {"missing caption": 7}
    assert counted == dict.fromkeys(range(7), 1)
    more_ranks_than_shards = opened_by_ranks(names[:2], world_size=3)
    assert [found.sizes.tolist() for found in more_ranks_than_shards if isinstance(found, Shards)] == [[1, 2]] * 3


def test_a_shard_that_one_rank_cannot_open_is_an_error_on_all(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=3, per_shard=2)
    (tmp_path / "00001.tar").write_bytes(b"no tar at all" * 100)
    found = opened_by_ranks(expand_patterns([str(tmp_path)]), world_size=2)
    assert [type(error) for error in found] == [UserError, UserError]
    assert all("00001.tar is not an uncompressed tar file" in str(error) for error in found)
