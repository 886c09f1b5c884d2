"""Patterns name shards, or one clear error says what is missing; remote shards are copied once."""

import io
import os
from pathlib import Path

import fsspec
import pytest

from configs import UserError
from data.shards import Shards
from data.storage import braces, expand, fetch
from tests.data.tar_shards import index_of, write_corpus

pytestmark = pytest.mark.L0


def test_brace_ranges_keep_their_padding_and_multiply() -> None:
    assert braces("a{08..11}-{x,y}.tar")[:3] == ["a08-x.tar", "a08-y.tar", "a09-x.tar"]
    assert len(braces("{000000..000099}.tar")) == 100
    assert braces("plain.tar") == ["plain.tar"]


def test_globs_ranges_and_directories_name_the_same_shards_once(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=3, per_shard=1)
    named = [str(tmp_path / f"0000{i}.tar") for i in range(3)]
    patterns = [f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00002}}.tar", str(tmp_path)]
    assert [expand([pattern]) for pattern in patterns] == [named] * 3
    assert expand(patterns) == named


def test_missing_shards_empty_directories_and_idle_globs_are_user_errors(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=2, per_shard=1)
    with pytest.raises(
        UserError, match=r"data\.train=.*3 of 5 shards are missing \(.*00002\.tar, .*correct the pattern"
    ):
        expand([f"{tmp_path}/{{00000..00004}}.tar"])
    (tmp_path / "empty").mkdir()
    for pattern in (f"{tmp_path}/empty", f"{tmp_path}/*.tgz"):
        with pytest.raises(UserError, match="matches no file"):
            expand([pattern])
    with pytest.raises(UserError, match=r"data\.held_out is empty"):
        expand([], key="data.held_out")


def test_remote_shards_are_copied_into_the_cache_once_and_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    write_corpus(tmp_path / "local", num_shards=2, per_shard=3)
    remote = fsspec.filesystem("memory")
    for tar in (tmp_path / "local").glob("*.tar"):
        remote.pipe(f"/corpus/{tar.name}", tar.read_bytes())
    names = expand(["memory://corpus/*.tar"], tmp_path / "cache")
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
        expand(["memory://corpus/0.tar"])
    with pytest.raises(UserError, match="cannot be opened"):
        expand(["nosuch://corpus/*.tar"], tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        expand(["memory://nowhere/*.tar"], tmp_path)
    with pytest.raises(UserError, match=r"memory://nowhere/0\.tar does not exist"):
        Shards(expand(["memory://nowhere/0.tar"], tmp_path), "txt", tmp_path)


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
    remote.pipe("/flaky/0.tar", b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "open", lambda *_, **__: Breaking(b"whole", error))
        with pytest.raises(OSError, match=r"connection reset|503 of a client library|2 of 5 bytes"):
            fetch("memory://flaky/0.tar", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert fetch("memory://flaky/0.tar", tmp_path).read_bytes() == b"whole"


def test_a_storage_that_fails_while_the_corpus_is_opened_is_a_user_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe("/down/0.tar", b"whole")
    monkeypatch.setattr("data.patience._FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(type(remote), "open", lambda *_, **__: Breaking(b"whole", OSError("no route")))
    with pytest.raises(UserError, match=r"memory://down/0\.tar cannot be read \(no route\), tried 2 times"):
        Shards(["memory://down/0.tar"], "txt", tmp_path, tries=2)


# --- links


def test_links_are_followed_and_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    write_corpus(tmp_path / "real", num_shards=1, per_shard=2)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.tar").symlink_to(tmp_path / "real" / "00000.tar")
    assert expand([f"{linked}/*.tar"]) == [str(linked / "a.tar")]
    assert Shards(expand([str(linked)]), "txt").read(0, 1).key == "a/000001"
    for target in ("nowhere.tar", "circle.tar", "/dev/zero", str(tmp_path)):
        link = linked / "circle.tar"
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"1 of 2 shards are missing \({linked}/circle\.tar\)"):
            expand([str(linked)])
        link.unlink()
    os.mkfifo(linked / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar"):
        expand([str(linked)])


def test_below_two_stars_a_link_to_a_folder_above_itself_leads_to_no_shard_twice(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", num_shards=2, per_shard=1)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert expand([f"{tmp_path}/**/*.tar"]) == [str(tmp_path / "a" / f"0000{i}.tar") for i in range(2)]
