"""A Hugging Face hub on this machine's loopback: one repository to read, as much of the protocol as a download needs.

with serving(directory, "someone/tokenizer") as hub:
    hub.url         # for HF_ENDPOINT
    hub.asked       # (method, path, Authorization header) of every request
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    url: str
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)


@contextmanager
def serving(directory: Path, name: str) -> Iterator[Hub]:
    """The files of `directory` as the repository `name`, at any revision."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _answer(self, has_body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
            file = directory / self.path.rsplit("/", 1)[-1]
            if not self.path.startswith(f"/{name}/resolve/") or not file.is_file():
                self.send_response(404)
                is_known = self.path.startswith(f"/{name}/")
                self.send_header("X-Error-Code", "EntryNotFound" if is_known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{file.name}-{len(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
