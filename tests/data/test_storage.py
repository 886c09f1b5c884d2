"""Patterns name shards, or one clear error says what is missing; remote shards are copied once."""

import io
from pathlib import Path

import fsspec
import pytest

from configs import UserError
from data.shards import Shards, ensure_sidecar
from data.storage import braces, expand, fetch
from tests.data.tar_shards import write_corpus

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
    remote.pipe("/indexed/00000.idx", ensure_sidecar(tar)[0].read_bytes())
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


def test_a_failing_copy_is_tried_again_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe("/flaky/0.tar", b"whole")
    tries: list[int] = []
    opened = type(remote).open

    class Breaking(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError("connection reset")

    def flaky(self: object, path: str, mode: str = "rb", **options: object) -> object:
        tries.append(1)
        return Breaking() if len(tries) < 3 else opened(self, path, mode, **options)

    monkeypatch.setattr("data.storage._WAITS_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(type(remote), "open", flaky)
    assert fetch("memory://flaky/0.tar", tmp_path).read_bytes() == b"whole"
    tries.clear()
    monkeypatch.setattr("data.storage._WAITS_SECONDS", (0.0, 0.0))
    with pytest.raises(UserError, match=r"connection reset\), tried 2 times"):
        fetch("memory://flaky/0.tar", tmp_path / "again")
    assert not [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
