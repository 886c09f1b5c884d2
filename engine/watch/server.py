"""Rank 0's side: hears every rank, answers each word, and tells all when one is lost.

    server = Server(Judge(...), token, address="10.0.0.1")
    server.port                          # ranks connect here, and begin with the token
    server.close()

Lines of JSON: {"token": ...} first, then beats; {"goodbye": true} before an end that is meant, {"failed": "...",
"code": 75} before one by an exception. Answers: {"first": beat} to a beat, the last one of rank 0; {"left": beat,
"why": ..., "code": 75}; {"verdict": ...}.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from engine.watch.judge import Beat, Judge

LOOK_EVERY = 0.2  # seconds
LONGEST_LINE = 1 << 16  # bytes: more is nobody of ours


class _Peer:
    """One connection. `rank` is known once it has shown the token."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rank, self.received = connection, -1, b""

    def send(self, message: dict[str, Any]) -> None:
        """A peer that cannot be told is found out by its silence."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Server:
    """Listens from the moment it is made, in a thread of its own."""

    def __init__(self, judge: Judge, token: str, address: str) -> None:
        self._judge, self._token = judge, token
        self._listener = listener(address)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []
        self._is_closing, self._has_judged = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="watch server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and all connections, once what ranks have said is passed on: also why this one leaves."""
        self._is_closing.set()
        self._thread.join()

    def _serve(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_closing.is_set()
            for key, _ in self._selector.select(0 if is_last else LOOK_EVERY):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            verdict = None if self._has_judged else self._judge.verdict(time.monotonic())
            if verdict is not None:
                self._has_judged = True
                self._tell_all({"verdict": asdict(verdict)})
        for peer in list(self._peers):
            self._drop(peer)
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(1.0)  # for writing; reading happens when there is something
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(4096)
        except OSError:
            received = b""
        *lines, peer.received = (peer.received + received).split(b"\n")
        try:
            for line in lines:
                self._take(peer, json.loads(line))
        except (ValueError, KeyError, TypeError):
            received = b""  # not one of ours
        if not received or len(peer.received) > LONGEST_LINE:
            self._drop(peer)
            if peer.rank >= 0:
                self._judge.closed(peer.rank)

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if message["token"] != self._token:
                raise ValueError("not the token of this run")
            peer.rank = int(message["rank"])
        elif "goodbye" in message:
            self._judge.goodbye(peer.rank)
        elif "failed" in message:
            self._judge.goodbye(peer.rank)
            beat = self._judge.beat_of(peer.rank)
            left = {"left": asdict(beat), "why": str(message["failed"]), "code": int(message["code"])}
            self._tell_all(left, but=peer)
        else:
            self._judge.heard(Beat(**message), time.monotonic())
            peer.send({"first": asdict(self._judge.beat_of(0))})

    def _tell_all(self, message: dict[str, Any], but: _Peer | None = None) -> None:
        """Rank 0 at last: its end is that of this server."""
        for peer in sorted(self._peers, key=lambda peer: peer.rank == 0):
            if peer is not but:
                peer.send(message)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)


def listener(address: str) -> socket.socket:
    """A socket that listens at a free port of `address`, or of all addresses where that is not one of this machine."""
    try:
        return socket.create_server((address, 0))
    except OSError:
        return socket.create_server(("", 0))
