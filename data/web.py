"""Files on web servers, http:// and https://, read with the standard library; all trouble is an OSError that names it.

    version = copy("https://host/corpus/00000.tar", file)   # Version(size=10240, etag='"5f3c"', modified="Mon, ...")
    stat("https://host/corpus/00000.tar").differs_from(version)
    links("https://host/corpus/")                            # the files that its directory page names

A server that says nothing for a minute has failed; one that is slow has not, however long a file takes. What a status
means is said once, for the errors of other client libraries too: `error_for_status`.
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

from data.patience import RetryLater

_SILENT_SECONDS = 60.0  # without a byte
_COPY_BYTES = 1 << 20
_MOST_PAGE_BYTES = 1 << 26  # of a directory page
# Answers that may be others a moment later; all other refusals stay.
_PASSING = (408, 425, 429, 500, 502, 503, 504, 507, 508, 509, 520, 521, 522, 523, 524, 529)
_GONE = (404, 410)
_KEPT = "/%:@!$&'()*+,;=~"  # of a path or a query, beside letters, digits and -._


@dataclass(frozen=True)
class Version:
    """What a server says of a file's content; None where it says nothing."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    def differs_from(self, other: Version) -> bool:
        """Whether the content has changed, as far as both can tell: by size, then by ETag, without one by time."""
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified) and self.modified != other.modified


def is_web(name: str) -> bool:
    """Whether it is a URL that this module reads."""
    return name.startswith(("http://", "https://"))


def error_for_status(name: str, status: int | None, words: str, retry_after: str | None = None) -> OSError:
    """FileNotFoundError (404), RetryLater (429, 5xx), PermissionError (other refusals), or OSError without a status."""
    text = f"{name}: the server answers {status} {words}".rstrip() if status else f"{name}: {words}"
    if status in _GONE:
        return FileNotFoundError(text)
    if status in _PASSING:
        return RetryLater(text, float(retry_after) if retry_after and retry_after.strip().isdigit() else 0.0)
    return PermissionError(text) if status and status >= 400 else OSError(text)


def stat(url: str) -> Version:
    """The version that the server has now, without the content. Raises OSError."""
    try:
        with _response(url, "HEAD") as response:
            found = _version(response.headers)
            return found if found.size else Version(None, found.etag, found.modified)  # 0: said of what is made anew
    except PermissionError:  # addresses that are signed are signed for one method
        with _response(url, "GET", {"Range": "bytes=0-0"}) as response:
            return _version(response.headers)


def copy(url: str, file: BinaryIO) -> Version:
    """Writes the content into a file. Raises OSError, also where it ends early."""
    with _response(url, "GET") as response:
        version, start = _version(response.headers), file.tell()
        shutil.copyfileobj(response, file, _COPY_BYTES)
        copied = file.tell() - start
    if version.size is not None and version.size != copied:
        raise OSError(f"{url} gave {copied} of {version.size} bytes")
    return Version(copied, version.etag, version.modified)


def links(url: str) -> list[str]:
    """The addresses that a directory's page leads to. Raises OSError."""
    with _response(url, "GET") as response:
        page = response.read(_MOST_PAGE_BYTES)
    parser = _Links()
    parser.feed(page.decode(errors="replace"))
    return [urljoin(url, link) for link in parser.found]


class _Links(HTMLParser):
    """Collects where <a href> lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class _Redirects(HTTPRedirectHandler):
    """Followed with the method that was asked with: a HEAD stays one."""

    http_error_308 = HTTPRedirectHandler.http_error_302

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request:
        return Request(newurl, None, req.headers, req.origin_req_host, unverifiable=True, method=req.get_method())


@contextmanager
def _response(url: str, method: str, headers: Mapping[str, str] | None = None) -> Iterator[HTTPResponse]:
    try:
        with build_opener(_Redirects).open(_request(url, method, headers or {}), timeout=_SILENT_SECONDS) as response:
            yield response
    except HTTPError as error:
        with error:
            raise error_for_status(url, error.code, error.reason, error.headers.get("Retry-After")) from None
    except TimeoutError:
        raise _silence(url) from None
    except URLError as error:
        raise (
            _silence(url) if isinstance(error.reason, TimeoutError) else error_for_status(url, None, str(error.reason))
        ) from None
    except (ConnectionError, SSLError, HTTPException, ValueError) as error:
        raise error_for_status(url, None, f"{type(error).__name__}: {error}") from None


def _silence(url: str) -> OSError:
    return OSError(f"{url}: not a word from the server for {_SILENT_SECONDS:.0f} s")


def _request(url: str, method: str, headers: Mapping[str, str]) -> Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    target = urlunsplit((parts.scheme, host, quote(parts.path, _KEPT), quote(parts.query, _KEPT + "?"), ""))
    request = Request(target, headers={"User-Agent": "vtp-engine", "Accept-Encoding": "identity", **headers})
    request.method = method
    if user:  # not for the servers that it redirects to
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    return request


def _version(headers: HTTPMessage) -> Version:
    whole = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return Version(int(whole) if whole.isdigit() else None, headers.get("ETag"), headers.get("Last-Modified"))
