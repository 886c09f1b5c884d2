"""Files over HTTP and HTTPS with the standard library; every failure is an OSError that names the URL.

    version = download("https://host/corpus/00000.tar", file)   # FileVersion(size=10240, etag='"5f3c"', modified=...)
    http_version("https://host/corpus/00000.tar").differs_from(version)
    page_links("https://host/corpus/")                          # the URLs that a directory page links to

A request fails after a minute without a byte, however long it takes in all. `error_for_status` maps HTTP statuses to
exceptions, for the errors of other client libraries too.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException, HTTPMessage, HTTPResponse
from ssl import SSLError
from typing import IO, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

_TIMEOUT_SECONDS = 60.0  # without a byte
_COPY_BYTES = 1 << 20
_MAX_PAGE_BYTES = 1 << 26  # of a directory page
# Statuses worth a retry; all other refusals are permanent.
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504, 507, 508, 509, 520, 521, 522, 523, 524, 529)
_NOT_FOUND_STATUSES = (404, 410)
_SAFE_CHARACTERS = "/%:@!$&'()*+,;=~"  # of a path or a query, beside letters, digits and -._


class RetryLater(OSError):
    """A server is busy. `seconds` is the wait that it requests, 0 without one."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class FileVersion:
    """Size, ETag and modification time that a server reports of a file; None for what it does not report."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    def differs_from(self, other: FileVersion) -> bool:
        """Whether the content differs: by size, then by ETag, else by time. What either side lacks is not compared."""
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified) and self.modified != other.modified


def is_http(name: str) -> bool:
    """Whether a name is an http:// or https:// URL."""
    return name.startswith(("http://", "https://"))


def error_for_status(name: str, status: int | None, reason: str, retry_after: str | None = None) -> OSError:
    """Return FileNotFoundError (404), RetryLater (429, 5xx), PermissionError (others) or OSError (none)."""
    text = f"{name}: the server answers {status} {reason}".rstrip() if status else f"{name}: {reason}"
    if status in _NOT_FOUND_STATUSES:
        return FileNotFoundError(text)
    if status in _TRANSIENT_STATUSES:
        return RetryLater(text, float(retry_after) if retry_after and retry_after.strip().isdigit() else 0.0)
    return PermissionError(text) if status and status >= 400 else OSError(text)


def http_version(url: str) -> FileVersion:
    """Request the version of a file, without its content. Raises OSError."""
    try:
        with _response(url, "HEAD") as response:
            version = _version(response.headers)
            # A length of 0 is that of a generated page: unknown.
            return version if version.size else FileVersion(None, version.etag, version.modified)
    except PermissionError:  # signed URLs are signed for one method
        with _response(url, "GET", {"Range": "bytes=0-0"}) as response:
            return _version(response.headers)


def download(url: str, file: BinaryIO) -> FileVersion:
    """Download the content into a file; return its version. Raises OSError, also where the content ends early."""
    with _response(url, "GET") as response:
        version, start = _version(response.headers), file.tell()
        shutil.copyfileobj(response, file, _COPY_BYTES)
        copied = file.tell() - start
    if version.size is not None and version.size != copied:
        raise OSError(f"{url} gave {copied} of {version.size} bytes")
    return FileVersion(copied, version.etag, version.modified)


def page_links(url: str) -> list[str]:
    """Return the absolute URLs that a directory page links to. Raises OSError."""
    with _response(url, "GET") as response:
        page = response.read(_MAX_PAGE_BYTES)
    parser = _LinkParser()
    parser.feed(page.decode(errors="replace"))
    return [urljoin(url, link) for link in parser.links]


class _LinkParser(HTMLParser):
    """Collect the targets of <a href>."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


class _RedirectHandler(HTTPRedirectHandler):
    """Follow redirects with the original method: a HEAD stays a HEAD."""

    http_error_308 = HTTPRedirectHandler.http_error_302

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request:
        return Request(newurl, None, req.headers, req.origin_req_host, unverifiable=True, method=req.get_method())


@contextmanager
def _response(url: str, method: str, headers: Mapping[str, str] | None = None) -> Iterator[HTTPResponse]:
    try:
        with build_opener(_RedirectHandler).open(
            _request(url, method, headers or {}), timeout=_TIMEOUT_SECONDS
        ) as response:
            yield response
    except HTTPError as error:
        with error:
            raise error_for_status(url, error.code, error.reason, error.headers.get("Retry-After")) from None
    except TimeoutError:
        raise _timeout_error(url) from None
    except URLError as error:
        raise (
            _timeout_error(url)
            if isinstance(error.reason, TimeoutError)
            else error_for_status(url, None, str(error.reason))
        ) from None
    except (ConnectionError, SSLError, HTTPException, ValueError) as error:
        raise error_for_status(url, None, f"{type(error).__name__}: {error}") from None


def _timeout_error(url: str) -> OSError:
    return OSError(f"{url}: the server sent nothing for {_TIMEOUT_SECONDS:.0f} s")


def _request(url: str, method: str, headers: Mapping[str, str]) -> Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    target = urlunsplit(
        (parts.scheme, host, quote(parts.path, _SAFE_CHARACTERS), quote(parts.query, _SAFE_CHARACTERS + "?"), "")
    )
    request = Request(target, headers={"User-Agent": "vtp-engine", "Accept-Encoding": "identity", **headers})
    request.method = method
    if user:  # not sent to servers that it redirects to
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    return request


def _version(headers: HTTPMessage) -> FileVersion:
    whole = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return FileVersion(int(whole) if whole.isdigit() else None, headers.get("ETag"), headers.get("Last-Modified"))
