"""Cached local copies of remote shards, downloaded again where the file on the server has changed.

    cache = RemoteCache("/scratch/shards")
    cache.fetch("s3://bucket/corpus/00000.tar")         # path of the copy; downloaded if missing or outdated
    glob_urls("s3://bucket/corpus/*.tar")               # ["s3://bucket/corpus/00000.tar", ...]

data/http_files.py reads http:// and https://, fsspec every other URL (s3://, gs://, hf://, ...). A file beside each
copy records its version (size, ETag or time), which is compared with the server's at the first access by each process.
If the server does not answer, the copy is used. A page that a server sends in place of a shard, an error or a login,
is never kept.
"""

from __future__ import annotations

import fcntl
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec

from configs import UserError
from data import http_files
from data.durable_files import write_atomic
from data.http_files import FileVersion
from data.tar_headers import BLOCK, parse_header

T = TypeVar("T")
_LOCK_POLL_SECONDS = 0.2  # between two tries to take a lock that another process holds
_STALE_PART_SECONDS = 86_400
_MAX_NAME_BYTES = 200  # bytes of a copy's name; file systems take 255
# Keys of ETag and modification time in the `info` of fsspec's back ends.
_ETAG_KEYS = ("ETag", "etag", "generation", "xet_hash", "blob_id", "md5Hash", "content_md5", "checksum")
_TIME_KEYS = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


class NotAShard(OSError):
    """The server sent a text page in place of a shard."""


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def strip_query(name: str) -> str:
    """Return an HTTP URL without its query, such as `?download=true`; any other name unchanged."""
    return name.partition("?")[0] if http_files.is_http(name) else name


def remote_index_name(name: str) -> str | None:
    """Return the name of a remote shard's index: `a/0.tar?b` -> `a/0.idx?b`; None for a name without .tar."""
    path = strip_query(name)
    return f"{path.removesuffix('.tar')}.idx{name[len(path) :]}" if path.endswith(".tar") else None


def is_glob(name: str) -> bool:
    """Whether a URL's path is a glob. The `?` before a query and the brackets of an IPv6 host are no glob."""
    path = strip_query(name).partition("://")[2]
    return glob.has_magic(path.partition("/")[2] if http_files.is_http(name) else path)


def remote_version(name: str) -> FileVersion:
    """Request the version of a remote file. Raises OSError."""
    if http_files.is_http(name):
        return http_files.http_version(name)
    filesystem, path = _filesystem(name)
    return _version_of(_with_os_errors(name, lambda: filesystem.info(path)))


def glob_urls(name: str) -> list[str]:
    """List the URLs that a glob matches. Raises OSError, and UserError for an unsupported protocol."""
    if not http_files.is_http(name):
        filesystem, path = _filesystem(name)
        found = _with_os_errors(name, lambda: list(filesystem.glob(path)) or [path] * bool(filesystem.isfile(path)))
        return [filesystem.unstrip_protocol(match) for match in found]
    path, query = strip_query(name), name[len(strip_query(name)) :]
    folder = os.path.dirname(path)
    if glob.has_magic(folder.partition("://")[2].partition("/")[2]):
        raise UserError(
            f"{name}: a web server lists one directory at a time: wildcards may only follow the last /; name the "
            "directories one by one, or as a range such as {00..09}"
        )
    linked = {strip_query(link) for link in http_files.page_links(f"{folder}/{query}")}
    wanted = glob.escape(folder) + path[len(folder) :]
    return [link + query for link in sorted(linked) if link == path or fnmatch.fnmatchcase(unquote(link), wanted)]


class RemoteCache:
    """The copies of remote files in a cache directory, for one process. Thread-safe."""

    def __init__(self, cache_dir: str | Path) -> None:
        self._root = Path(cache_dir)
        self._checked: set[str] = set()  # versions compared with the server's
        self._locks: dict[str, threading.Lock] = {}  # by name: threads that need one file make one copy
        self._locks_guard = threading.Lock()
        self._unreachable_servers: set[str] = set()  # those that failed to report a version

    def fetch(self, name: str) -> Path:
        """Return the copy of a remote file, downloading it if needed. Raises OSError; FileNotFoundError for no file."""
        copy = self._path(name)
        with self._locks_guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if self._needs_copy(name, copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                with _locked(copy):
                    if self._needs_copy(name, copy):  # another process may have made it meanwhile
                        _download(name, copy)
            self._checked.add(name)
        return copy

    def _needs_copy(self, name: str, copy: Path) -> bool:
        return not copy.exists() or (name not in self._checked and self._is_outdated(name, copy))

    def is_copied(self, name: str) -> bool:
        """Whether there is a copy, of any version."""
        return self._path(name).exists()

    def forget(self, name: str) -> None:
        """Delete the copy: the next fetch downloads it again."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = strip_query(name)
        folder, base = os.path.dirname(path) + name[len(path) :], os.path.basename(path)
        if len(base.encode()) > _MAX_NAME_BYTES:
            folder, base = f"{folder}/{base}", base[-_MAX_NAME_BYTES // 4 :]
        if base.endswith(".idx"):  # X.idx is the index that is made of the copy
            base += ".remote"
        return self._root / hashlib.sha256(folder.encode()).hexdigest()[:12] / base

    def _is_outdated(self, name: str, copy: Path) -> bool:
        if _page_start(name, copy):
            return True
        server = urlsplit(name).netloc
        if server in self._unreachable_servers:
            return False
        try:
            return remote_version(name).differs_from(_recorded_version(copy))
        except (FileNotFoundError, PermissionError):
            return False
        except OSError:
            self._unreachable_servers.add(server)
            return False


@contextmanager
def _locked(copy: Path) -> Iterator[None]:
    """Hold a file lock while a copy is made; without one where the file system has no locks.

    Ranks that evaluate read the same shards at once. The lock ends with its process.
    """
    path = copy.with_name(f".{copy.name}.lock")
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _download(name: str, copy: Path) -> None:
    """Download under a temporary name and rename, so that other processes never read part of a shard."""
    _remove_stale_parts(copy)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        version = _with_os_errors(name, lambda: _copy(name, partial))
        if page := _page_start(name, partial):
            raise NotAShard(
                f"{name}: the server sent a page that begins {page!r} instead of a tar; give the URL of the file "
                "itself (on the Hugging Face hub /resolve/ instead of /blob/), and check whether it needs a login"
            )
        record = _version_path(copy)
        record.unlink(missing_ok=True)  # if the process is killed here, the copy is compared by size
        partial.replace(copy)
        with suppress(OSError):
            write_atomic(record, json.dumps(asdict(version)), is_synced=False)
    finally:
        partial.unlink(missing_ok=True)


def _remove_stale_parts(copy: Path) -> None:
    """Remove partial downloads of killed processes: those not written to for a day."""
    for partial in copy.parent.glob(f"{glob.escape(copy.name)}.*.part"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_PART_SECONDS:
                partial.unlink()


def _copy(name: str, target: Path) -> FileVersion:
    with target.open("xb") as file:
        if http_files.is_http(name):
            return http_files.download(name, file)
        filesystem, path = _filesystem(name)
        version = FileVersion()
        with suppress(NotImplementedError):
            version = _version_of(filesystem.info(path))
        with filesystem.open(path, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
            expected, copied = getattr(source, "size", None), file.tell()
    if isinstance(expected, int) and copied != expected:  # a broken connection can look like the end of the file
        raise OSError(f"{name} gave {copied} of {expected} bytes")
    return version


def _page_start(name: str, copy: Path) -> str:
    """Return the first characters of a copy that is a text page; "" for a tar and other bytes, and for an index."""
    if strip_query(name).endswith(".idx"):
        return ""
    with copy.open("rb") as file:
        block = file.read(BLOCK)
    is_text = all(byte > 31 or byte in b"\t\n\f\r" for byte in block)
    return block[:40].decode(errors="replace") if is_text and block and parse_header(block) is None else ""


def _version_path(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.version")


def _recorded_version(copy: Path) -> FileVersion:
    """Return the recorded version of a copy; its size alone where there is no record."""
    size = copy.stat().st_size
    try:
        recorded = json.loads(_version_path(copy).read_bytes())
        return FileVersion(size, recorded["etag"], recorded["modified"])
    except (OSError, ValueError, KeyError, TypeError):
        return FileVersion(size)


def _version_of(info: dict[str, Any]) -> FileVersion:
    size, etag, modified = (
        next((info[key] for key in keys if info.get(key) is not None), None)
        for keys in (("size",), _ETAG_KEYS, _TIME_KEYS)
    )
    return FileVersion(size, etag and str(etag), modified and str(modified))


def _filesystem(name: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {error}; install the fsspec back end for this protocol") from None


def _with_os_errors(name: str, request: Callable[[], T]) -> T:
    """Return request(); convert errors of client libraries into OSErrors with a message, which some of them lack."""
    try:
        return request()
    except UserError:
        raise
    except OSError as error:
        if _http_status(error) is None and str(error):
            raise
        kind = next((k for k in (FileNotFoundError, PermissionError) if isinstance(error, k)), None)
        if kind is not None:
            raise kind(str(error) or f"{name}: {type(error).__name__}") from error
        raise http_files.error_for_status(name, _http_status(error), str(error) or type(error).__name__) from error
    except Exception as error:
        message = ": ".join(filter(None, (type(error).__name__, str(error))))
        raise http_files.error_for_status(name, _http_status(error), message) from error


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status in an error of a client library; None without one."""
    holders = (error, getattr(error, "response", None))
    found = (getattr(holder, name, None) for holder in holders for name in ("status", "status_code", "code"))
    return next((value for value in found if type(value) is int and 400 <= value < 600), None)
