"""The lost reaches every rank, though rank 0, which tells it, ends over it at once."""

from __future__ import annotations

import json
import queue
import socket
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pytest

from configs.run import WatchdogTimeouts as Settings
from engine.watchdog import server
from engine.watchdog.client import RankStatus, WatchdogClient
from engine.watchdog.server import Heartbeat, LostRanks, RankMonitor

pytestmark = pytest.mark.L0

STUCK = LostRanks("stuck", (0, 1), Heartbeat(0, "a", 3, "assembling"), "stuck: ranks 0 1")
SETTINGS = Settings(silent_seconds=2, stuck_seconds=5)


def say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def test_a_rank_whose_words_are_not_taken_any_more_still_reads_the_last_of_rank_0() -> None:
    found: queue.Queue[LostRanks] = queue.Queue()
    with closing(server.listen_at("127.0.0.1")) as listener:
        connection = socket.create_connection(listener.getsockname())
        watch = WatchdogClient(connection, 1, RankStatus(), SETTINGS, found.put)
        watch.start("token")
        rank_0, _ = listener.accept()
        rank_0.recv(1)  # there is more, unread: when it closes, the other side's next word is refused
        say(rank_0, {"rank_0": asdict(STUCK.last)})
        time.sleep(0.2)  # less than a beat: the other side now waits until its next
        say(rank_0, {"lost": asdict(STUCK)})
        rank_0.close()
        assert found.get(timeout=10) == STUCK
        watch.close()


def test_a_connection_that_ends_without_a_word_is_a_dead_rank_0() -> None:
    found: queue.Queue[LostRanks] = queue.Queue()
    with closing(server.listen_at("127.0.0.1")) as listener:
        watch = WatchdogClient(socket.create_connection(listener.getsockname()), 1, RankStatus(), SETTINGS, found.put)
        watch.start("token")
        listener.accept()[0].close()
        lost = found.get(timeout=10)
        assert (lost.kind, lost.ranks) == ("dead", (0,))
        watch.close()


def test_rank_0_is_told_after_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is told ends it, and the server with it."""
    told: queue.Queue[int] = queue.Queue()

    def send(peer: Any, message: dict[str, Any]) -> None:
        told.put(peer.rank)

    monkeypatch.setattr(server._Peer, "send", send)
    watched = server.WatchdogServer(RankMonitor(3, 60, 60, time.monotonic()), "token", "127.0.0.1")
    watched.start()
    peers = [socket.create_connection(("127.0.0.1", watched.port)) for _ in range(3)]
    try:
        for rank, peer in enumerate(peers):
            say(peer, {"token": "token", "rank": rank})
            say(peer, asdict(Heartbeat(rank, "a", 0, "assembling")))
            assert told.get(timeout=10) == rank, "an answer to its beat"
        peers[1].close()
        assert [told.get(timeout=10) for _ in range(2)] == [2, 0]
    finally:
        for peer in peers:
            peer.close()
        watched.close()
