"""Patterns name shards, or one clear error says what is missing; remote shards are copied once."""

import io
import os
from pathlib import Path

import fsspec
import pytest

from configs import UserError
from data import storage
from data.shards import Shards
from data.storage import ShardStorage, expand_braces, expand_patterns, require_any_shard
from tests.data.tar_shards import index_of, write_corpus

pytestmark = pytest.mark.L0


def test_brace_ranges_keep_their_padding_and_multiply() -> None:
    assert list(expand_braces("a{08..11}-{x,y}.tar"))[:3] == ["a08-x.tar", "a08-y.tar", "a09-x.tar"]
    assert len(list(expand_braces("{000000..000099}.tar"))) == 100
    assert list(expand_braces("plain.tar")) == ["plain.tar"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{0..6..3}", "0 3 6"),
        ("{3..0..2}", "3 1"),
        ("{08..10}", "08 09 10"),
        ("{8..10}", "8 9 10"),
        ("{00..100..50}", "000 050 100"),  # as bash pads: to the longer end
        ("{a..c}{1..2}", "a1 a2 b1 b2 c1 c2"),
        ("{0{1..2},x{y,z}}", "01 02 xy xz"),
        ("{7}-{a}-{{1..2}}", "{7}-{a}-{1} {7}-{a}-{2}"),  # braces around one word stay
        ("a{1..2", "a{1..2"),
        ("a}1..2{", "a}1..2{"),
        ("{,b}c", "c bc"),
        ("{-1..1}", "-1 0 1"),
    ],
)
def test_braces_expand_as_in_bash(pattern: str, names: str) -> None:
    assert " ".join(expand_braces(pattern)) == names


def test_lists_are_split_before_their_ranges_are_expanded(tmp_path: Path) -> None:
    for folder in "ab":
        write_corpus(tmp_path / folder, num_shards=2, per_shard=1)
    there = [str(tmp_path / folder / f"0000{i}.tar") for folder in "ab" for i in range(2)]
    assert expand_patterns([f"{tmp_path}/a/{{00000..00001}}.tar::{tmp_path}/b/*.tar"]) == there
    with pytest.raises(UserError, match=r"d/.*: 2000 of 2000 shards are missing"):  # multiplied they would be 4 million
        expand_patterns([f"{tmp_path}/a/*.tar::{tmp_path}/d/{{0000..1999}}.tar::{tmp_path}/e/{{0000..1999}}.tar"])


def test_a_range_of_too_many_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MAX_NAMES", 1000)
    with pytest.raises(UserError, match=r"s/\{0\.\.9999999999\}\.tar' names more than 1,000 shards"):
        expand_patterns(["s/{0..9999999999}.tar"])


def test_colons_and_wildcards_within_a_url_belong_to_it(tmp_path: Path) -> None:
    assert expand_patterns(["http://[::1]:8000/{0..1}.tar?a=*::https://h/x.tar"], tmp_path) == [
        "http://[::1]:8000/0.tar?a=*", "http://[::1]:8000/1.tar?a=*", "https://h/x.tar",
    ]  # fmt: skip
    fsspec.filesystem("memory").pipe("/signs/a[0].tar", b"tar")
    for chain in ("", "simplecache::"):
        [name] = expand_patterns([f"{chain}memory://signs/a[0].tar"], tmp_path)
        assert name.endswith("/signs/a[0].tar")


def test_an_existing_path_is_taken_literally(tmp_path: Path) -> None:
    folder = tmp_path / "my {1..2} [data]::v#1"
    write_corpus(folder, num_shards=1, per_shard=1)
    shard = folder / "a[0]{x,y}.tar"
    (folder / "00000.tar").rename(shard)
    for pattern in (shard, folder, f"{folder}/*.tar", f"{folder}/{{a,a}}*.tar::{shard}", f"{tmp_path}/m*/a[[]0]*.tar"):
        assert expand_patterns([str(pattern)]) == [str(shard)], pattern
    assert Shards([str(shard)], "txt").read(0, 0).key == "a[0]{x,y}/000000"


def test_a_shard_under_several_names_is_counted_once_under_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a", num_shards=2, per_shard=1)
    (tmp_path / "link.tar").symlink_to(tmp_path / "a" / "00000.tar")
    monkeypatch.chdir(tmp_path)
    others = [
        "./a/00000.tar",
        f"{tmp_path}/a/*.tar",
        "link.tar",
        f"file://{tmp_path}/a/00001.tar",
        "a/../a/{00000..00001}.tar",
    ]
    assert expand_patterns(["a/00000.tar", *others]) == [f"{tmp_path}/a/00001.tar", "a/00000.tar"]


def test_absolute_and_relative_paths_and_urls_can_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in "abc":
        write_corpus(tmp_path / folder, num_shards=1, per_shard=1)
    monkeypatch.chdir(tmp_path)
    remote = fsspec.filesystem("memory")
    remote.pipe("/mixed/00000.tar", (tmp_path / "c" / "00000.tar").read_bytes())
    names = expand_patterns(["a/*.tar", f"{tmp_path}/b/*.tar", "memory://mixed/00000.tar"], tmp_path / "cache")
    shards = Shards(names, "txt", tmp_path / "cache")
    assert shards.sizes.tolist() == [1, 1, 1]
    keys = [shards.read(i, 0).key for i in range(3)]
    assert keys == [f"{tmp_path}/b/00000/000000", "a/00000/000000", "memory://mixed/00000/000000"]


def test_a_resume_needs_one_existing_shard(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=1)
    require_any_shard([f"{tmp_path}/gone.tar", f"{tmp_path}/00000.tar"])
    require_any_shard(["gone.tar", "s3://bucket/0.tar"])
    with pytest.raises(UserError, match=r"none of the run's 2 shards in data\.train exists \(the first is gone/0\.tar"):
        require_any_shard(["gone/0.tar", "gone/1.tar"])


def test_globs_ranges_and_directories_name_the_same_shards_once(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=3, per_shard=1)
    named = [str(tmp_path / f"0000{i}.tar") for i in range(3)]
    patterns = [f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00002}}.tar", str(tmp_path)]
    assert [expand_patterns([pattern]) for pattern in patterns] == [named] * 3
    assert expand_patterns(patterns) == named


def test_missing_shards_empty_directories_and_idle_globs_are_user_errors(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=2, per_shard=1)
    with pytest.raises(
        UserError, match=r"data\.train=.*3 of 5 shards are missing \(.*00002\.tar, .*correct the pattern"
    ):
        expand_patterns([f"{tmp_path}/{{00000..00004}}.tar"])
    (tmp_path / "empty").mkdir()
    for pattern in (f"{tmp_path}/empty", f"{tmp_path}/*.tgz"):
        with pytest.raises(UserError, match="matches no file"):
            expand_patterns([pattern])
    with pytest.raises(UserError, match=r"data\.held_out is empty"):
        expand_patterns([], key="data.held_out")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0}::", "element 2 of 2 is empty: .* or remove the :: beside it"),
        ("::{0}", "element 1 of 2 is empty"),
        ("{0}::::{0}", "element 2 of 3 is empty"),
        ("", "element 1 of 1 is empty: .* name a .tar file"),
        ("{{,{0}}}", r"1 of 2 shards are missing \(one without a name\)"),
    ],
)
def test_an_empty_element_of_a_pattern_is_refused_by_its_number(tmp_path: Path, pattern: str, message: str) -> None:
    write_corpus(tmp_path, num_shards=1, per_shard=1)
    with pytest.raises(UserError, match=message):
        expand_patterns([pattern.format(tmp_path / "00000.tar")])


def test_remote_shards_are_copied_into_the_cache_once_and_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    write_corpus(tmp_path / "local", num_shards=2, per_shard=3)
    remote = fsspec.filesystem("memory")
    for tar in (tmp_path / "local").glob("*.tar"):
        remote.pipe(f"/corpus/{tar.name}", tar.read_bytes())
    names = expand_patterns(["memory://corpus/*.tar"], tmp_path / "cache")
    assert [Path(name).name for name in names] == ["00000.tar", "00001.tar"]
    shards = Shards(names, "txt", tmp_path / "cache")
    assert shards.read(1, 2).caption == "sample 5"
    remote.rm("/corpus", recursive=True)
    assert Shards(names, "txt", tmp_path / "cache").read(0, 1).caption == "sample 1"


def test_a_sidecar_beside_a_remote_shard_spares_the_copy_until_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    write_corpus(tmp_path / "local", num_shards=1, per_shard=3)
    tar = tmp_path / "local" / "00000.tar"
    remote = fsspec.filesystem("memory")
    remote.pipe("/indexed/00000.tar", tar.read_bytes())
    remote.pipe("/indexed/00000.idx", index_of(tar).read_bytes())
    shards = Shards(["memory://indexed/00000.tar"], "txt", tmp_path / "cache")
    assert shards.sizes.tolist() == [3]
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert shards.read(0, 2).caption == "sample 2"
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1


def test_remote_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is remote but system\.loader\.cache_dir is not set"):
        expand_patterns(["memory://corpus/0.tar"])
    with pytest.raises(UserError, match="cannot be opened"):
        expand_patterns(["nosuch://corpus/*.tar"], tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        expand_patterns(["memory://nowhere/*.tar"], tmp_path)
    with pytest.raises(UserError, match=r"memory://nowhere/0\.tar does not exist"):
        Shards(expand_patterns(["memory://nowhere/0.tar"], tmp_path), "txt", tmp_path)


WHOLE = b"\0" * 10240  # a tar without members


class Breaking(io.BytesIO):
    """What a connection that is cut off gives: an error, or an early end."""

    def __init__(self, whole: bytes, error: Exception | None) -> None:
        super().__init__(whole[: len(whole) // 2])
        self.size, self._error = len(whole), error

    def read(self, *arguments: int) -> bytes:
        if self._error is not None:
            raise self._error
        return super().read(*arguments)


@pytest.mark.parametrize("error", [OSError("connection reset"), ValueError("503 of a client library"), None])
def test_a_copy_that_fails_or_ends_early_is_an_os_error_and_leaves_nothing(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe("/flaky/0.tar", WHOLE)
    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "open", lambda *_, **__: Breaking(WHOLE, error))
        with pytest.raises(OSError, match=r"connection reset|503 of a client library|5120 of 10240 bytes"):
            ShardStorage(tmp_path).fetch("memory://flaky/0.tar")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert ShardStorage(tmp_path).fetch("memory://flaky/0.tar").read_bytes() == WHOLE


def test_a_storage_that_fails_while_the_corpus_is_opened_is_a_user_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe("/down/0.tar", WHOLE)
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(type(remote), "open", lambda *_, **__: Breaking(WHOLE, OSError("no route")))
    with pytest.raises(UserError, match=r"memory://down/0\.tar cannot be read \(no route\), tried 2 times"):
        Shards(["memory://down/0.tar"], "txt", tmp_path, tries=2)


# --- links


def test_links_are_followed_and_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    write_corpus(tmp_path / "real", num_shards=1, per_shard=2)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.tar").symlink_to(tmp_path / "real" / "00000.tar")
    assert expand_patterns([f"{linked}/*.tar"]) == [str(linked / "a.tar")]
    assert Shards(expand_patterns([str(linked)]), "txt").read(0, 1).key == "a/000001"
    for target in ("nowhere.tar", "circle.tar", "/dev/zero", str(tmp_path)):
        link = linked / "circle.tar"
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"1 of 2 shards are missing \({linked}/circle\.tar\)"):
            expand_patterns([str(linked)])
        link.unlink()
    os.mkfifo(linked / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar"):
        expand_patterns([str(linked)])


def test_below_two_stars_a_link_to_a_folder_above_itself_leads_to_no_shard_twice(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", num_shards=2, per_shard=1)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert expand_patterns([f"{tmp_path}/**/*.tar"]) == [str(tmp_path / "a" / f"0000{i}.tar") for i in range(2)]
