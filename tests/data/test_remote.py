"""Shards on servers that refuse, stumble, are slow, or have another file by now: one copy, of what the server has."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage
from pathlib import Path

import fsspec
import pytest

from configs import UserError
from data import http_files, remote
from data.http_files import FileVersion, RetryLater, error_for_status
from data.shards import Shards
from data.storage import ShardStorage, StorageRetries, expand_patterns
from data.tar_index import ShardIndexes, ensure_index
from tests.data.loopback_http import HttpServer, serving
from tests.data.tar_shards import encoded, write_tar
from tests.harness import free_port

pytestmark = pytest.mark.L0

PAGE = b"<!DOCTYPE html>\n<title>Sign in</title>" + b" " * 400


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def tar_of(*captions: str) -> bytes:
    """A shard of as many samples; its size hangs on their number alone."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, caption in enumerate(captions):
            for ext, content in (("jpg", encoded(0)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


TWO = tar_of("a cat", "a dog")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving({"/c/0.tar": TWO}) as here:
        yield here


def captions_of(url: str, cache: Path, **options: int) -> list[str]:
    """As a new process reads the shard."""
    shards = Shards(expand_patterns([url], cache), "txt", cache, **options)
    return [shards.read(0, i).caption for i in range(int(shards.sizes[0]))]


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- refusals and stumbles


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_an_index_that_the_server_refuses_counts_as_missing(server: HttpServer, tmp_path: Path, status: int) -> None:
    server.answers["/c/0.idx"] = [status]
    assert captions_of(f"{server.url}/c/0.tar", tmp_path) == ["a cat", "a dog"]
    assert server.requests == ["GET /c/0.idx", "GET /c/0.tar"]


def test_a_page_in_place_of_an_index_counts_as_missing(server: HttpServer, tmp_path: Path) -> None:
    server.files["/c/0.idx"] = PAGE
    assert captions_of(f"{server.url}/c/0.tar", tmp_path) == ["a cat", "a dog"]


@pytest.mark.parametrize("status", [429, 500])
def test_an_index_that_the_server_fails_to_send_for_ever_is_made_from_the_shard(
    server: HttpServer, tmp_path: Path, status: int
) -> None:
    server.answers["/c/0.idx"] = [status]
    assert captions_of(f"{server.url}/c/0.tar", tmp_path) == ["a cat", "a dog"]
    assert server.requests.count("GET /c/0.idx") == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_transient_http_errors_are_tried_again(server: HttpServer, tmp_path: Path, status: int) -> None:
    server.answers |= {"/c/0.tar": [status, status, 200], "/c/0.idx": [status, 404]}
    assert captions_of(f"{server.url}/c/0.tar", tmp_path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            503,
            r"cannot be read \(http://127\.0\.0\.1:\d+/c/0\.tar: the server answers 503 Service Unavailable\), tried 3",
        ),
        (429, "answers 429 Too Many Requests"),
        (403, r"the server answers 403 Forbidden\): every named shard"),
        (404, r"0\.tar does not exist"),
    ],
)
def test_the_last_http_error_is_named(server: HttpServer, tmp_path: Path, status: int, says: str) -> None:
    server.answers["/c/0.tar"] = [status]
    with pytest.raises(UserError, match=says):
        captions_of(f"{server.url}/c/0.tar", tmp_path, tries=3)
    is_passing = status in (429, 503)
    assert server.requests.count("GET /c/0.tar") == (3 if is_passing else 1)


def test_http_statuses_map_to_exceptions() -> None:
    kinds = {
        404: FileNotFoundError,
        410: FileNotFoundError,
        401: PermissionError,
        451: PermissionError,
        503: RetryLater,
    }
    assert {status: type(error_for_status("u", status, "")) for status in kinds} == kinds
    busy = error_for_status("u", 429, "Too Many Requests", "7")
    assert isinstance(busy, RetryLater)
    assert busy.seconds == 7
    assert error_for_status("u", 503, "", "Wed, 21 Oct 2026 07:28:00 GMT").seconds == 0  # type: ignore[attr-defined]


def test_retry_after_sets_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    retries, waits = StorageRetries(tries=3), list[float]()
    monkeypatch.setattr(retries._is_stopped, "wait", lambda seconds: waits.append(seconds))
    answers = iter([RetryLater("busy", 7.0), RetryLater("busy", 3600.0)])

    def ask() -> str:
        for error in answers:
            raise error
        return "here"

    assert retries(ask) == "here"
    assert waits == [7.0, 60.0]


class Wordless(Exception):
    """An error of a client library."""

    def __init__(self, status: int | None = None) -> None:
        super().__init__()
        self.status = status


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (TimeoutError(), OSError, "memory://q/0.tar: TimeoutError"),
        (Wordless(), OSError, "memory://q/0.tar: Wordless"),
        (Wordless(503), RetryLater, "memory://q/0.tar: the server answers 503 Wordless"),
        (Wordless(403), PermissionError, "memory://q/0.tar: the server answers 403 Wordless"),
        (FileNotFoundError(), FileNotFoundError, "memory://q/0.tar: FileNotFoundError"),
    ],
)
def test_errors_of_client_libraries_always_have_a_message(
    error: Exception, kind: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    with pytest.raises(kind) as caught:
        ShardStorage(tmp_path).fetch("memory://q/0.tar")
    assert str(caught.value) == says


# --- time


def test_a_slow_download_is_not_limited_and_a_pause_without_data_is(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six pieces 0.8 s apart take longer than the silence that is allowed; one that never comes does too."""
    monkeypatch.setattr(http_files, "_TIMEOUT_SECONDS", 4.0)
    server.files["/c/0.tar"] = TWO + bytes(6 * 4096 - len(TWO))
    server.pause, server.pause_seconds = threading.Event(), 0.8
    assert len(captions_of(f"{server.url}/c/0.tar", tmp_path)) == 2
    monkeypatch.setattr(http_files, "_TIMEOUT_SECONDS", 0.1)
    server.pause_seconds = 60.0
    with pytest.raises(OSError, match=r"c/0\.tar: the server sent nothing for 0 s"):
        ShardStorage(tmp_path / "other").fetch(f"{server.url}/c/0.tar")
    assert files_below(tmp_path / "other") == []


@pytest.mark.parametrize("size", [0, 700])
def test_a_copy_that_ends_early_is_an_error_and_leaves_nothing(server: HttpServer, tmp_path: Path, size: int) -> None:
    server.cut_after = size
    with pytest.raises(OSError, match=rf"gave {size} of {len(TWO)} bytes"):
        ShardStorage(tmp_path).fetch(f"{server.url}/c/0.tar")
    assert files_below(tmp_path) == []


def test_a_closed_connection_is_an_error_with_its_url(server: HttpServer, tmp_path: Path) -> None:
    server.closes_connections = True
    with pytest.raises(OSError, match=rf"^{server.url}/c/0\.tar: RemoteDisconnected: Remote end closed connection"):
        ShardStorage(tmp_path).fetch(f"{server.url}/c/0.tar")
    nobody = f"http://127.0.0.1:{free_port()}/c/0.tar"
    with pytest.raises(OSError, match=rf"^{nobody}: \[Errno \d+\] Connection refused$"):
        ShardStorage(tmp_path).fetch(nobody)


# --- one copy, of what the server has


def test_an_address_with_a_query_is_fetched_once_under_its_own_name(server: HttpServer, tmp_path: Path) -> None:
    for _ in range(2):
        shards = Shards(expand_patterns([f"{server.url}/c/{{0..0}}.tar?download=true"], tmp_path), "txt", tmp_path)
        assert [shards.read(0, i).key for i in range(2)] == ["0/0", "0/1"]
    assert server.requests == [
        "GET /c/0.idx?download=true",
        "GET /c/0.tar?download=true",
        "HEAD /c/0.tar?download=true",
    ]


@pytest.mark.parametrize("num_processes", [1, 4])
def test_threads_and_processes_make_one_copy_of_a_shard(
    server: HttpServer, tmp_path: Path, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ShardStorage stands for a process: file locks know open files, not processes."""
    monkeypatch.setattr(remote, "_LOCK_POLL_SECONDS", 0.01)
    disks, url = [ShardStorage(tmp_path) for _ in range(num_processes)], f"{server.url}/c/0.tar"
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda i: disks[i % num_processes].fetch(url), range(8)))) == 1
    assert server.requests.count("GET /c/0.tar") == 1
    assert files_below(tmp_path) == [".0.tar.version", "0.tar"]


def test_a_copy_is_made_on_a_file_system_without_locks(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(remote.fcntl, "flock", fail)
    assert ShardStorage(tmp_path).fetch(f"{server.url}/c/0.tar").read_bytes() == TWO


def test_urls_that_differ_in_their_query_are_different_shards(tmp_path: Path) -> None:
    names = ["http://h/get?file=1", "http://h/get?file=2"]
    assert ShardIndexes(names, "txt", ShardStorage(tmp_path), tmp_path, 4).labels == names
    assert remote.remote_index_name(names[0]) is None
    copies = remote.RemoteCache(tmp_path)
    long = f"http://h/{'x' * 300}.tar?X-Amz-Signature={'0' * 500}"
    assert len({copies._path(name) for name in (*names, long)}) == 3
    assert len(copies._path(long).name) < 256


@pytest.mark.parametrize("has_etags", [True, False])
def test_a_changed_file_of_the_same_size_is_downloaded_again(
    server: HttpServer, tmp_path: Path, has_etags: bool
) -> None:
    url, server.has_etags, server.headers["Last-Modified"] = f"{server.url}/c/0.tar", has_etags, "Monday"
    for _ in range(2):
        assert captions_of(url, tmp_path) == ["a cat", "a dog"]
    assert server.requests.count("GET /c/0.tar") == 1
    server.files["/c/0.tar"], server.headers["Last-Modified"] = tar_of("a cow", "a hen"), "Tuesday"
    assert len(server.files["/c/0.tar"]) == len(TWO)
    for _ in range(2):
        assert captions_of(url, tmp_path) == ["a cow", "a hen"]
    assert server.requests.count("GET /c/0.tar") == 2


def test_a_changed_file_behind_fsspec_is_downloaded_again(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    for caption in ("a cat", "a cow"):
        storage.pipe("/replaced/0.tar", tar_of(caption))
        assert captions_of("memory://replaced/0.tar", tmp_path) == [caption]


def test_versions_are_compared_by_size_then_etag_then_time() -> None:
    one = FileVersion(10, "a", "Monday")
    assert not one.differs_from(FileVersion(10, "a", "Tuesday"))
    assert not one.differs_from(FileVersion())
    assert not one.differs_from(FileVersion(10, None, "Monday"))
    for other in (FileVersion(11, "a", "Monday"), FileVersion(10, "b", "Monday"), FileVersion(10, None, "Tuesday")):
        assert one.differs_from(other)


def test_the_copy_is_used_where_the_server_does_not_answer(server: HttpServer, tmp_path: Path) -> None:
    url = f"{server.url}/c/0.tar"
    captions_of(url, tmp_path)
    for status in (403, 404, 503):
        server.answers["/c/0.tar"] = [status]
        assert captions_of(url, tmp_path) == ["a cat", "a dog"]


def test_partial_downloads_are_removed_after_a_day(server: HttpServer, tmp_path: Path) -> None:
    disk, url = ShardStorage(tmp_path), f"{server.url}/c/0.tar"
    folder = disk.fetch(url).parent
    old, fresh = folder / "0.tar.1.2.part", folder / "0.tar.3.4.part"
    for partial in (old, fresh):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    disk.forget(url)
    disk.fetch(url)
    assert not old.exists()
    assert fresh.exists()


def test_a_page_in_place_of_a_shard_is_refused_at_once_and_not_cached(server: HttpServer, tmp_path: Path) -> None:
    server.files["/c/0.tar"] = PAGE
    with pytest.raises(UserError, match=r"0\.tar: the server sent a page that begins '<!DOCTYPE html>.*/resolve/"):
        captions_of(f"{server.url}/c/0.tar", tmp_path)
    assert server.requests.count("GET /c/0.tar") == 1
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("content", [PAGE, b"\x1f\x8b\x08\x00"])
def test_a_cached_copy_that_is_not_a_tar_is_downloaded_again(
    server: HttpServer, tmp_path: Path, content: bytes
) -> None:
    """Its size and its noted ETag are those of the server's file."""
    url = f"{server.url}/c/0.tar"
    ShardStorage(tmp_path).fetch(url).write_bytes(content.ljust(len(TWO), content[-1:]))
    assert captions_of(url, tmp_path) == ["a cat", "a dog"]
    assert server.requests.count("GET /c/0.tar") == 2


def test_a_remote_file_that_is_not_a_tar_is_named_by_its_url(server: HttpServer, tmp_path: Path) -> None:
    server.files["/c/0.tar"] = bytes([31, 139]) * 300
    with pytest.raises(UserError, match=rf"^{server.url}/c/0\.tar: .* is not an uncompressed tar file"):
        captions_of(f"{server.url}/c/0.tar", tmp_path)
    assert server.requests.count("GET /c/0.tar") == 1


def test_an_outdated_remote_index_is_replaced_by_that_of_the_copy(server: HttpServer, tmp_path: Path) -> None:
    """The server's index is of a shard with as many bytes and other members."""
    old = write_tar(
        tmp_path / "0.tar", {"x.jpg": encoded(0), "x.txt": b"a cat", "y.jpg": encoded(0), "y.txt": b"a dog"}
    )
    server.files |= {"/c/0.idx": ensure_index(old).content(), "/c/0.tar": old.read_bytes()}
    url, cache = f"{server.url}/c/0.tar", tmp_path / "cache"
    server.files["/c/0.tar"] = TWO.ljust(old.stat().st_size, b"\0")
    for _ in range(2):
        shards = Shards([url], "txt", cache)
        assert shards.sizes.tolist() == [2]
        assert [shards.read(0, i).key for i in range(2)] == ["0/0", "0/1"]


def test_directory_pages_are_globbed_and_redirects_keep_the_method_but_not_the_password(
    server: HttpServer, tmp_path: Path
) -> None:
    server.files["/list/"] = (
        b'<a href="/">up</a><a href="1%20a.tar">1</a><a href="/list/0.tar">0</a><a href="2.txt">2</a>'
    )
    server.answers["/list/"] = [503, 200]
    names = expand_patterns([f"{server.url}/list/*.tar"], tmp_path)
    assert [name.removeprefix(server.url) for name in names] == ["/list/0.tar", "/list/1%20a.tar"]
    server.answers["/list/"] = [403]
    with pytest.raises(UserError, match=r"cannot be listed \(.*/list/: the server answers 403 Forbidden\)"):
        expand_patterns([f"{server.url}/list/*.tar"], tmp_path)
    with pytest.raises(UserError, match=r"wildcards may only follow the last /"):
        expand_patterns([f"{server.url}/*/0.tar"], tmp_path)
    with serving({"/elsewhere.tar": TWO}) as other:
        server.moved["/m.tar"] = f"{other.url}/elsewhere.tar"
        secret = f"{server.url}/m.tar".replace("//", "//ann:pass@")
        for _ in range(2):
            assert captions_of(secret, tmp_path) == ["a cat", "a dog"]
        assert [line.split()[0] for line in other.requests] == ["GET", "HEAD"]
        assert set(other.authorizations) == {None}
    assert server.authorizations[-1] == "Basic YW5uOnBhc3M="


def test_a_server_without_head_is_asked_for_one_byte(server: HttpServer, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(url: str, method: str, headers: dict[str, str] | None = None) -> None:
        asked.append(f"{method} {headers}")
        raise error_for_status(url, 405, "Method Not Allowed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_files, "_response", answer)
        with pytest.raises(PermissionError):
            http_files.http_version(f"{server.url}/c/0.tar")
    assert asked == ["HEAD None", "GET {'Range': 'bytes=0-0'}"]
    headers = HTTPMessage()
    headers["Content-Length"], headers["Content-Range"] = "1", "bytes 0-0/3000"
    assert http_files._version(headers) == FileVersion(3000)
