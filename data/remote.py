"""Remote shards by a copy in the cache directory, made once and kept for as long as the server has the same.

    copies = RemoteCopies("/scratch/shards")
    copies.fetch("s3://bucket/corpus/00000.tar")       # the copy's path; copied now where it is missing or outdated
    matches("s3://bucket/corpus/*.tar")                 # ["s3://bucket/corpus/00000.tar", ...]

http:// and https:// are read by data/web.py, every other URL by what fsspec has for it (s3://, gs://, hf://, ...).
Beside a copy lies a note of its version (size, ETag or time): the first time that a process asks for a shard, it is
compared with what the server has. Where the server does not answer, the copy is what there is. A page that a server
sends in a shard's place, an error or a login, is never kept.
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
from data import web
from data.tars.headers import BLOCK, parse
from data.web import Version
from data.whole_file import write_whole

T = TypeVar("T")
_LOCK_SECONDS = 0.2  # between two looks at whether another process has made its copy
_LEFT_OVER_SECONDS = 86_400
_LONGEST_NAME = 200  # bytes of a copy's name; file systems take 255
# What back ends call it, in their `info` of a file.
_ETAGS = ("ETag", "etag", "generation", "xet_hash", "blob_id", "md5Hash", "content_md5", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


class NotAShard(OSError):
    """A server sent a page in a shard's place."""


def is_remote(name: str) -> bool:
    """Whether it is a URL."""
    return "://" in name


def without_query(name: str) -> str:
    """A web address without its `?download=true`; any other name as it is."""
    return name.partition("?")[0] if web.is_web(name) else name


def index_name(name: str) -> str | None:
    """Where the index of a remote shard would lie: `a/0.tar?b` -> `a/0.idx?b`; None where the name ends otherwise."""
    path = without_query(name)
    return f"{path.removesuffix('.tar')}.idx{name[len(path) :]}" if path.endswith(".tar") else None


def has_magic(name: str) -> bool:
    """Whether a URL's path is a glob; `?` begins the query of a web address, and brackets stand around an IPv6 one."""
    path = without_query(name).partition("://")[2]
    return glob.has_magic(path.partition("/")[2] if web.is_web(name) else path)


def stat(name: str) -> Version:
    """What the server has now. Raises OSError."""
    if web.is_web(name):
        return web.stat(name)
    filesystem, path = _filesystem(name)
    return _version(_with_os_errors(name, lambda: filesystem.info(path)))


def matches(name: str) -> list[str]:
    """The URLs that a glob matches. Raises OSError, and UserError for a protocol that nothing here reads."""
    if not web.is_web(name):
        filesystem, path = _filesystem(name)
        found = _with_os_errors(name, lambda: list(filesystem.glob(path)) or [path] * bool(filesystem.isfile(path)))
        return [filesystem.unstrip_protocol(match) for match in found]
    path, query = without_query(name), name[len(without_query(name)) :]
    folder = os.path.dirname(path)
    if glob.has_magic(folder.partition("://")[2].partition("/")[2]):
        raise UserError(
            f"{name}: a web server lists one folder at a time, so * may stand behind the last / alone; write the "
            "folders one by one, or a range such as {00..09}"
        )
    there = {without_query(link) for link in web.links(f"{folder}/{query}")}
    wanted = glob.escape(folder) + path[len(folder) :]
    return [link + query for link in sorted(there) if link == path or fnmatch.fnmatchcase(unquote(link), wanted)]


class RemoteCopies:
    """The copies below one directory, as one process uses them. Thread-safe."""

    def __init__(self, cache_dir: str | Path) -> None:
        self._root = Path(cache_dir)
        self._compared: set[str] = set()  # with what the server has
        self._one_by_one: dict[str, threading.Lock] = {}  # two threads that want one shard make one copy
        self._guard = threading.Lock()
        self._unreachable: set[str] = set()  # servers that did not answer when asked for a version

    def fetch(self, name: str) -> Path:
        """The copy of a remote file. Raises OSError; FileNotFoundError: there is no such file, and no copy."""
        copy = self._path(name)
        with self._guard:
            lock = self._one_by_one.setdefault(name, threading.Lock())
        with lock:
            if self._is_wanted(name, copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                with _other_processes_wait(copy):
                    if self._is_wanted(name, copy):  # not since another process has made it
                        _download(name, copy)
            self._compared.add(name)
        return copy

    def _is_wanted(self, name: str, copy: Path) -> bool:
        return not copy.exists() or (name not in self._compared and self._is_outdated(name, copy))

    def is_copied(self, name: str) -> bool:
        """Whether there is a copy, of whatever version."""
        return self._path(name).exists()

    def forget(self, name: str) -> None:
        """The next fetch copies anew."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = without_query(name)
        folder, base = os.path.dirname(path) + name[len(path) :], os.path.basename(path)
        if len(base.encode()) > _LONGEST_NAME:
            folder, base = f"{folder}/{base}", base[-_LONGEST_NAME // 4 :]
        if base.endswith(".idx"):  # the index of a copied shard is made here, and lies under that name beside it
            base += ".remote"
        return self._root / hashlib.sha256(folder.encode()).hexdigest()[:12] / base

    def _is_outdated(self, name: str, copy: Path) -> bool:
        if _start_of_page(name, copy):
            return True
        server = urlsplit(name).netloc
        if server in self._unreachable:
            return False
        try:
            return stat(name).differs_from(_recorded_version(copy))
        except (FileNotFoundError, PermissionError):
            return False
        except OSError:
            self._unreachable.add(server)
            return False


@contextmanager
def _other_processes_wait(copy: Path) -> Iterator[None]:
    """Ranks that evaluate want the same shards at once. A lock that ends with its process; without locks all copy."""
    path = copy.with_name(f".{copy.name}.lock")
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_SECONDS)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _download(name: str, copy: Path) -> None:
    """Copies to a temporary name first, so that another process never sees half a shard."""
    _remove_left_over(copy)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        version = _with_os_errors(name, lambda: _copy(name, partial))
        if page := _start_of_page(name, partial):
            raise NotAShard(
                f"{name}: the server sends a page that begins {page!r}, no tar; give the address of the file itself "
                "(on the Hugging Face hub /resolve/ instead of /blob/), and see whether it wants a login"
            )
        note = _version_file(copy)
        note.unlink(missing_ok=True)  # a kill in between leaves a copy of unknown version: compared by size
        partial.replace(copy)
        with suppress(OSError):
            write_whole(note, json.dumps(asdict(version)), is_synced=False)
    finally:
        partial.unlink(missing_ok=True)


def _remove_left_over(copy: Path) -> None:
    """Halves that killed processes have left: nobody has written to them for a day."""
    for partial in copy.parent.glob(f"{glob.escape(copy.name)}.*.part"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _LEFT_OVER_SECONDS:
                partial.unlink()


def _copy(name: str, target: Path) -> Version:
    with target.open("xb") as file:
        if web.is_web(name):
            return web.copy(name, file)
        filesystem, path = _filesystem(name)
        version = Version()
        with suppress(NotImplementedError):
            version = _version(filesystem.info(path))
        with filesystem.open(path, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
            expected, copied = getattr(source, "size", None), file.tell()
    if isinstance(expected, int) and copied != expected:  # a connection that is cut off can look like the end
        raise OSError(f"{name} gave {copied} of {expected} bytes")
    return version


def _start_of_page(name: str, copy: Path) -> str:
    """The first characters of a copy that is plain text and no tar; "" for any other, and for an index."""
    if without_query(name).endswith(".idx"):
        return ""
    with copy.open("rb") as file:
        block = file.read(BLOCK)
    is_text = all(byte > 31 or byte in b"\t\n\f\r" for byte in block)
    return block[:40].decode(errors="replace") if is_text and block and parse(block) is None else ""


def _version_file(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.version")


def _recorded_version(copy: Path) -> Version:
    """The version of a copy; its size alone where nothing is written down."""
    size = copy.stat().st_size
    try:
        noted = json.loads(_version_file(copy).read_bytes())
        return Version(size, noted["etag"], noted["modified"])
    except (OSError, ValueError, KeyError, TypeError):
        return Version(size)


def _version(info: dict[str, Any]) -> Version:
    size, etag, modified = (
        next((info[key] for key in keys if info.get(key) is not None), None) for keys in (("size",), _ETAGS, _TIMES)
    )
    return Version(size, etag and str(etag), modified and str(modified))


def _filesystem(name: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {error}; install the fsspec back end for this protocol") from None


def _with_os_errors(name: str, request: Callable[[], T]) -> T:
    """request(). Turns the errors of client libraries, some of which have no text, into OSErrors that have one."""
    try:
        return request()
    except UserError:
        raise
    except OSError as error:
        if _status(error) is None and str(error):
            raise
        kind = next((k for k in (FileNotFoundError, PermissionError) if isinstance(error, k)), None)
        if kind is not None:
            raise kind(str(error) or f"{name}: {type(error).__name__}") from error
        raise web.error_for_status(name, _status(error), str(error) or type(error).__name__) from error
    except Exception as error:
        words = ": ".join(filter(None, (type(error).__name__, str(error))))
        raise web.error_for_status(name, _status(error), words) from error


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of a client library carries, under whichever name."""
    holders = (error, getattr(error, "response", None))
    found = (getattr(holder, name, None) for holder in holders for name in ("status", "status_code", "code"))
    return next((value for value in found if type(value) is int and 400 <= value < 600), None)
