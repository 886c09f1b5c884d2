"""Rank 0's side of the watchdog: the rule that says whether a rank is lost, and the server that collects heartbeats.

    monitor = RankMonitor(world_size=8, silent_seconds=60, stuck_seconds=1800, now=0.0)
    monitor.on_heartbeat(Heartbeat(rank=3, host="b", step=120, phase="backward"), now=1.0)
    monitor.on_disconnect(3)
    monitor.lost_ranks(now=2.0)                  # LostRanks(kind="dead", ranks=(3,), ...)

    server = WatchdogServer(monitor, token, address="10.0.0.1")
    server.start()
    server.port                                  # ranks connect here, and begin with the token
    server.close()

Messages are lines of JSON. From a rank: {"token": ..., "rank": 3} first, then heartbeats; {"goodbye": true} before a
normal end, {"failed": "...", "code": 75} before one by an exception. To a rank: {"rank_0": heartbeat} in answer to a
heartbeat; {"failed": heartbeat, "error": ..., "code": 75}; {"lost": LostRanks}.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.exits import LOST_RANK

# Phases of a rank that waits for others (engine/reporting/phase_timing.py, engine/trainer.py).
WAITING_PHASES = ("all_gather", "reduce_scatter", "all_reduce", "backward", "optimizer", "report", "barrier")
POLL_SECONDS = 0.2
MAX_LINE_BYTES = 1 << 16  # a peer that sends more is no rank of this run


@dataclass(frozen=True)
class Heartbeat:
    """A rank's status. `step` counts finished steps."""

    rank: int
    host: str
    step: int
    phase: str


@dataclass(frozen=True)
class LostRanks:
    """Which ranks are lost, and why; `last` is the last heartbeat of the first of them."""

    kind: str  # dead, silent, stuck, failed
    ranks: tuple[int, ...]
    last: Heartbeat
    message: str
    code: int = LOST_RANK  # exit code of the other ranks


class RankMonitor:
    """Decide from heartbeats and their times whether a rank is lost: a pure rule, without clock or network.

    Ranks that have said goodbye are no longer monitored.
    """

    def __init__(self, world_size: int, silent_seconds: float, stuck_seconds: float, now: float) -> None:
        self._silent_seconds, self._stuck_seconds = silent_seconds, stuck_seconds
        self._last = {rank: Heartbeat(rank, "?", 0, "starting") for rank in range(world_size)}
        self._last_time = dict.fromkeys(range(world_size), now)
        # When a rank's heartbeat last differed from the one before: another phase, or another step, lower ones
        # included.
        self._last_progress = now
        self._present = set(range(world_size))
        self._disconnected: list[int] = []

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """Take a heartbeat, at `now` in seconds; one that differs from the rank's last is progress of the run."""
        if heartbeat != self._last[heartbeat.rank]:
            self._last_progress = now
        self._last[heartbeat.rank], self._last_time[heartbeat.rank] = heartbeat, now

    def on_disconnect(self, rank: int) -> None:
        """Note that the rank's connection has ended; without a goodbye the rank is dead."""
        if rank in self._present:
            self._disconnected.append(rank)

    def on_goodbye(self, rank: int) -> None:
        """Stop to monitor a rank that ends on purpose."""
        self._present.discard(rank)

    def last_heartbeat(self, rank: int) -> Heartbeat:
        """Return the rank's last heartbeat; before its first, step 0 in "starting" on host "?"."""
        return self._last[rank]

    def lost_ranks(self, now: float) -> LostRanks | None:
        """Return dead ranks, else silent ones, else those that the run is stuck at; None where all is well."""
        if self._disconnected:
            return self._lost("dead", tuple(self._disconnected), "its process has ended without a word")
        silent = [rank for rank in sorted(self._present) if now - self._last_time[rank] > self._silent_seconds]
        if silent:
            reason = f"not heard of for {self._silent_seconds:g} s: stopped, or cut off"
            return self._lost("silent", tuple(silent), reason)
        if self._present and now - self._last_progress > self._stuck_seconds:
            reason = f"no rank has ended a step or a phase for {self._stuck_seconds:g} s"
            return self._lost("stuck", self._suspects(), reason)
        return None

    def _suspects(self) -> tuple[int, ...]:
        """Return the ranks furthest behind; of them those that do not wait for others, if there are any."""
        lowest = min(self._last[rank].step for rank in self._present)
        behind = sorted(rank for rank in self._present if self._last[rank].step == lowest)
        busy = [rank for rank in behind if self._last[rank].phase not in WAITING_PHASES]
        return tuple(busy or behind)

    def _lost(self, kind: str, ranks: tuple[int, ...], reason: str) -> LostRanks:
        others = self._describe(self._present - set(ranks))
        text = f"{kind}: {self._describe(set(ranks))}: {reason}"
        return LostRanks(kind, ranks, self._last[ranks[0]], f"{text}{f'; others: {others}' if others else ''}")

    def _describe(self, ranks: set[int]) -> str:
        """Describe where ranks are: 'rank 3 (host b) after step 120 in backward, ranks 0 1 (host a) after step ...'."""
        by_status = defaultdict(list)
        for rank in sorted(ranks):
            by_status[replace(self._last[rank], rank=0)].append(str(rank))
        return ", ".join(
            f"{'rank' if len(numbers) == 1 else 'ranks'} {' '.join(numbers)} (host {at.host}) after step {at.step} "
            f"in {at.phase}"
            for at, numbers in by_status.items()
        )


class _Peer:
    """One connection. `rank` is known once it has sent the token."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rank, self.received = connection, -1, b""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a peer that cannot be reached shows by its silence."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class WatchdogServer:
    """Collect heartbeats in a thread, answer each, and tell all ranks when one is lost.

    It listens at `port` from its construction on; `start` begins to serve.
    """

    def __init__(self, monitor: RankMonitor, token: str, address: str) -> None:
        self._monitor, self._token = monitor, token
        self._listener = listen_at(address)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []
        self._is_closing, self._has_reported = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="watchdog server", daemon=True)

    def start(self) -> None:
        """Begin to serve in a thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections, once what ranks have sent is passed on, also why this rank leaves."""
        self._is_closing.set()
        self._thread.join()

    def _serve(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_closing.is_set()
            for key, _ in self._selector.select(0 if is_last else POLL_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            lost = None if self._has_reported else self._monitor.lost_ranks(time.monotonic())
            if lost is not None:
                self._has_reported = True
                self._send_all({"lost": asdict(lost)})
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
                self._handle(peer, json.loads(line))
        except (ValueError, KeyError, TypeError):
            received = b""  # no rank of this run
        if not received or len(peer.received) > MAX_LINE_BYTES:
            self._drop(peer)
            if peer.rank >= 0:
                self._monitor.on_disconnect(peer.rank)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if message["token"] != self._token:
                raise ValueError("not the token of this run")
            peer.rank = int(message["rank"])
        elif "goodbye" in message:
            self._monitor.on_goodbye(peer.rank)
        elif "failed" in message:
            self._monitor.on_goodbye(peer.rank)
            last = asdict(self._monitor.last_heartbeat(peer.rank))
            failure = {"failed": last, "error": str(message["failed"]), "code": int(message["code"])}
            self._send_all(failure, but=peer)
        else:
            self._monitor.on_heartbeat(Heartbeat(**message), time.monotonic())
            peer.send({"rank_0": asdict(self._monitor.last_heartbeat(0))})

    def _send_all(self, message: dict[str, Any], but: _Peer | None = None) -> None:
        """Send to all ranks, rank 0 last: its end is that of this server."""
        for peer in sorted(self._peers, key=lambda peer: peer.rank == 0):
            if peer is not but:
                peer.send(message)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)


def listen_at(address: str) -> socket.socket:
    """Return a socket that listens at a free port of `address`, or of all addresses where that is not this host's."""
    try:
        return socket.create_server((address, 0))
    except OSError:
        return socket.create_server(("", 0))
