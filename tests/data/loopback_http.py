"""An HTTP server on this machine whose responses a test sets.

with serving({"/c/0.tar": tar}) as web:
    web.answers["/c/0.idx"] = [403]                 # for ever
    web.answers["/c/1.tar"] = [503, 503]            # the first two times; then what `files` has
    Shards([f"{web.url}/c/0.tar"], "txt", cache)
    web.requests                                    # ["GET /c/0.idx", "GET /c/0.tar"]
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HttpServer:
    """Files by path; `answers` are statuses returned instead, in order, a single one for ever."""

    url: str
    files: dict[str, bytes]
    answers: dict[str, list[int]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # of every response
    moved: dict[str, str] = field(default_factory=dict)  # path -> where to
    requests: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    has_etags: bool = True
    pause: threading.Event | None = None  # never set: each 4 KiB wait `pause_seconds`
    pause_seconds: float = 0.0
    cut_after: int | None = None  # bytes, then the connection ends
    closes_connections: bool = False  # without a response

    def status(self, path: str) -> int:
        left = self.answers.get(path, [])
        if len(left) > 1:
            return left.pop(0)
        return left[0] if left else 200


class _Server(ThreadingHTTPServer):
    web: HttpServer


class _Handler(BaseHTTPRequestHandler):
    """Respond as `HttpServer` says."""

    server: _Server

    def do_GET(self) -> None:
        web = self.server.web
        web.requests.append(f"{self.command} {self.path}")
        if web.closes_connections:
            self.close_connection = True
            return
        web.authorizations.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path in web.moved:
            self._head(302, b"", {"Location": web.moved[path]})
            return
        status, content = web.status(path), web.files.get(path)
        if status != 200 or content is None:
            self._head(status if status != 200 else 404, b"", {})
            return
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'} if web.has_etags else {}
        self._head(200, content, etag)
        if self.command == "GET":
            self._send(content)

    do_HEAD = do_GET

    def _head(self, status: int, content: bytes, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **self.server.web.headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes) -> None:
        web = self.server.web
        content = content[: web.cut_after]
        for start in range(0, len(content), 4096):
            if web.pause is not None:
                web.pause.wait(web.pause_seconds)
            self.wfile.write(content[start : start + 4096])
        if web.cut_after is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[HttpServer]:
    """Run the server until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    web = server.web = HttpServer(f"http://127.0.0.1:{server.server_address[1]}", dict(files))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        if web.pause is not None:
            web.pause.set()
        server.shutdown()
        server.server_close()
        thread.join()
