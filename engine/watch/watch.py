"""A rank's side: says once a second where it is, and ends the process when a rank is lost.

    with watched(config, run_dir) as place:     # as soon as the ranks have met, to the very end
        place.at("assembling")                  # place.py

Alone a rank is not watched: its launcher sees it die, and nobody else waits for it. A rank that fails by itself tells
the others why, and they end with its exit code: what no restart can help on one rank, it cannot on all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs import RunConfig, UserError
from configs.run import WatchdogTimeouts as Settings
from engine import world
from engine.complaint import complain
from engine.exits import FAILED, LOST_RANK, MISTAKE
from engine.failures import Failure, record
from engine.health.failure import TrainingFailed
from engine.watch.judge import Beat, Judge, Verdict
from engine.watch.place import Place
from engine.watch.server import Server

BEAT_EVERY = 1.0  # seconds; a quarter of silent_seconds where that is shorter
GRACE_SECONDS = 10.0  # for ranks that fail alike to say so themselves, after one has said it
Lost = Callable[[Verdict], None]


class Watch:
    """Of this rank, which is at `place`. `lost` is called once, in the watch's thread."""

    def __init__(self, connection: socket.socket, rank: int, place: Place, settings: Settings, lost: Lost) -> None:
        self._connection, self._rank, self._place, self._lost = connection, rank, place, lost
        self._silent = settings.silent_seconds
        self._every = min(BEAT_EVERY, self._silent / 4)
        self._host, self._received = socket.gethostname(), b""
        self._is_closing, self._may_send = threading.Event(), threading.Lock()
        self._is_idle, self._heard = False, 0.0
        self._first = Beat(0, "?", 0, "?")  # where rank 0 was when it last answered
        self._left: tuple[float, Verdict] | None = None  # when a rank's own failure is held against all
        connection.settimeout(self._every)
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def start(self, token: str) -> None:
        """Shows rank 0 the token, then begins to beat in a thread. Raises OSError where the connection has ended."""
        self._send({"token": token, "rank": self._rank})
        self._thread.start()

    def close(self, failed: str = "", code: int = LOST_RANK) -> None:
        """Says goodbye; with `failed`, that others need not wait for this rank, and end with `code`."""
        self._is_closing.set()
        with suppress(OSError):
            self._send({"failed": failed, "code": code} if failed else {"goodbye": True})
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def linger(self) -> None:
        """This rank has nothing to do any more: waits to hear which rank is lost, in which case it ends there."""
        self._is_idle = True
        self._thread.join(self._silent + 2 * GRACE_SECONDS)

    def _beat(self) -> None:
        self._heard = time.monotonic()
        while not self._is_closing.wait(0):
            began = time.monotonic()
            # Where rank 0 takes no word any more, its last may still be to be read: it ends over a verdict, too.
            is_deaf, is_mute = self._has_ended(self._say_where), self._has_ended(self._take)
            if self._is_closing.is_set():
                return
            trouble = "its connection has ended" if is_deaf or is_mute else ""
            if time.monotonic() - self._heard > self._silent:
                trouble = f"not heard of for {self._silent:g} s: stopped, or cut off"
            if verdict := self._verdict(trouble):
                self._lost(verdict)
                return
            self._is_closing.wait(max(0.0, self._every - (time.monotonic() - began)))

    @staticmethod
    def _has_ended(use: Callable[[], None]) -> bool:
        """Whether the connection has, as its use tells."""
        try:
            use()
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def _say_where(self) -> None:
        self._send(asdict(Beat(self._rank, self._host, self._place.step, self._place.phase)))

    def _verdict(self, trouble: str) -> Verdict | None:
        """What this rank has to go by once a rank has left, or rank 0 is not to be heard."""
        if self._left is not None:
            due, verdict = self._left
            return verdict if self._is_idle or time.monotonic() > due else None
        if not trouble:
            return None
        kind = "dead" if "ended" in trouble else "silent"
        place = f"rank 0 (host {self._first.host}) after step {self._first.step} in {self._first.phase}"
        own = f"rank {self._rank} is after step {self._place.step} in {self._place.phase}"
        return Verdict(kind, (0,), self._first, f"{kind}: {place}, which watches: {trouble}; {own}")

    def _send(self, message: dict[str, Any]) -> None:
        with self._may_send:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _take(self) -> None:
        """What rank 0 has said. Raises TimeoutError, and OSError where the connection has ended."""
        received = self._connection.recv(1 << 16)
        if not received:
            raise ConnectionError("closed")
        self._heard = time.monotonic()
        *lines, self._received = (self._received + received).split(b"\n")
        for message in map(json.loads, lines):
            if "first" in message:
                self._first = Beat(**message["first"])
            elif "verdict" in message:
                found = message["verdict"]
                beat = Beat(**found["beat"])
                self._left = (0.0, Verdict(found["kind"], tuple(found["ranks"]), beat, found["message"], found["code"]))
            elif "left" in message:
                beat = Beat(**message["left"])
                words = f"failed: rank {beat.rank} (host {beat.host}) after step {beat.step} in {beat.phase}"
                verdict = Verdict("failed", (beat.rank,), beat, f"{words}: {message['why']}", message["code"])
                self._left = (time.monotonic() + GRACE_SECONDS, verdict)


@contextmanager
def watched(config: RunConfig, run_dir: Path) -> Iterator[Place]:
    """Inside, this rank is watched where it is not alone. A collective, also at an end without an exception."""
    place = Place()
    if world.world_size() == 1:
        yield place
        return
    settings, server = config.system.watch, None
    address, token = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_hex(16)
    if world.is_first():
        now = time.monotonic()
        judge = Judge(world.world_size(), settings.silent_seconds, settings.stuck_seconds, now)
        server = Server(judge, token, address)
    port, token = world.broadcast_object((server.port if server else 0, token))
    connection = socket.create_connection((address, port), timeout=settings.silent_seconds)
    watch = Watch(connection, world.rank(), place, settings, lambda verdict: end(verdict, run_dir))
    watch.start(token)
    try:
        yield place
    except BaseException as error:
        if world.is_of_others(error):
            watch.linger()
        kind = error.kind if isinstance(error, TrainingFailed) else type(error).__name__
        record(run_dir, Failure(world.rank(), place.step, place.phase, kind, str(error)))
        watch.close(failed=f"{type(error).__name__}: {error}", code=code_of(error))
        raise
    else:
        watch.close()
        world.barrier()  # rank 0 still answers the others until they have said goodbye
    finally:
        if server is not None:
            server.close()


def code_of(error: BaseException) -> int:
    """With which exit code a run ends that this error ends."""
    if isinstance(error, UserError):
        return MISTAKE
    return FAILED if isinstance(error, TrainingFailed) else LOST_RANK


def end(verdict: Verdict, run_dir: Path) -> None:
    """Says which rank is lost and ends this process at once: its main thread may wait for that rank for ever.

    Where no rank gets on, each says in which lines of code it stands: all may be in one phase, as when they assemble.
    """
    complain(f"error: rank {world.rank()} ends, a rank is lost: {verdict.message}")
    if verdict.kind == "stuck":
        with suppress(OSError, ValueError, RuntimeError):  # a stderr that is no file: nothing must keep from the end
            faulthandler.dump_traceback()
    if world.rank() == min(set(range(world.world_size())) - set(verdict.ranks), default=0):
        at = verdict.beat
        record(run_dir, Failure(verdict.ranks[0], at.step, at.phase, verdict.kind, verdict.message, host=at.host))
    os._exit(verdict.code)
