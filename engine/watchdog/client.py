"""A rank's side of the watchdog: report its status once a second, and end the process when a rank is lost.

    with watchdog(config, run_dir) as status:     # as soon as the ranks have met, to the very end
        status.at("assembling")                   # until a task is built
        status.follow_phases(phases)              # from then on the step's phases, and the loop sets the step
        status.step = 120
        status.phase                              # "backward"
        status.at("consolidating")                # after the last step

A lone rank is not watched: its launcher sees it die, and nobody else waits for it. A rank that fails by itself tells
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
from engine import distributed
from engine.exits import FAILED, LOST_RANK, MISTAKE, FailureRecord, record_failure
from engine.health.anomalies import TrainingFailed
from engine.stderr import print_error
from engine.watchdog.server import Heartbeat, LostRanks, RankMonitor, WatchdogServer
from profiling.instruments.phases import PhaseTimer

HEARTBEAT_SECONDS = 1.0  # between two; a quarter of silent_seconds where that is shorter
GRACE_SECONDS = 10.0  # for ranks that fail alike to report their own error, after one has


class RankStatus:
    """Finished steps and present phase of this rank. An error leaves it as it is, and so shows where that came from."""

    def __init__(self) -> None:
        self.step = 0
        self._stage, self._phases = "starting up", PhaseTimer(clock=None)

    @property
    def phase(self) -> str:
        """Phase of a step, or the stage outside of steps."""
        return self._stage or self._phases.current

    def at(self, stage: str) -> None:
        """Set what is done from now on, outside of steps."""
        self._stage = stage

    def follow_phases(self, phases: PhaseTimer) -> None:
        """Take the phase from the recorder of the steps from now on."""
        self._phases, self._stage = phases, ""


class WatchdogClient:
    """Connection of this rank to the server on rank 0. `on_lost` is called once, in the client's thread."""

    def __init__(
        self,
        connection: socket.socket,
        rank: int,
        status: RankStatus,
        settings: Settings,
        on_lost: Callable[[LostRanks], None],
    ) -> None:
        self._connection, self._rank, self._status, self._on_lost = connection, rank, status, on_lost
        self._silent_seconds = settings.silent_seconds
        self._period = min(HEARTBEAT_SECONDS, self._silent_seconds / 4)
        self._host, self._received = socket.gethostname(), b""
        self._is_closing, self._send_lock = threading.Event(), threading.Lock()
        self._is_idle, self._last_received = False, 0.0
        self._rank_0 = Heartbeat(0, "?", 0, "?")  # rank 0's status when it last answered
        self._failed: tuple[float, LostRanks] | None = None  # when this rank ends because of another's failure
        connection.settimeout(self._period)
        self._thread = threading.Thread(target=self._send_heartbeats, name="watchdog", daemon=True)

    def start(self, token: str) -> None:
        """Send the token, then begin to send heartbeats in a thread. Raises OSError where the connection has ended."""
        self._send({"token": token, "rank": self._rank})
        self._thread.start()

    def close(self, failed: str = "", code: int = LOST_RANK) -> None:
        """Say goodbye; with `failed`, report this rank's error, over which the others end with `code`."""
        self._is_closing.set()
        with suppress(OSError):
            self._send({"failed": failed, "code": code} if failed else {"goodbye": True})
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def wait_for_lost_ranks(self) -> None:
        """Wait, with nothing else to do, to learn which rank is lost; the process then ends here."""
        self._is_idle = True
        self._thread.join(self._silent_seconds + 2 * GRACE_SECONDS)

    def _send_heartbeats(self) -> None:
        self._last_received = time.monotonic()
        while not self._is_closing.wait(0):
            began = time.monotonic()
            # Where rank 0 takes no message any more, its last may still be to be read: both are tried.
            cannot_send, cannot_receive = _has_ended(self._send_heartbeat), _has_ended(self._receive)
            if self._is_closing.is_set():
                return
            trouble = "its connection has ended" if cannot_send or cannot_receive else ""
            if time.monotonic() - self._last_received > self._silent_seconds:
                trouble = f"not heard of for {self._silent_seconds:g} s: stopped, or cut off"
            if lost := self._lost_ranks(trouble):
                self._on_lost(lost)
                return
            self._is_closing.wait(max(0.0, self._period - (time.monotonic() - began)))

    def _send_heartbeat(self) -> None:
        self._send(asdict(Heartbeat(self._rank, self._host, self._status.step, self._status.phase)))

    def _lost_ranks(self, trouble: str) -> LostRanks | None:
        """Return over whom this rank ends: a rank that has failed, or rank 0 where there is `trouble` with it."""
        if self._failed is not None:
            due, lost = self._failed
            return lost if self._is_idle or time.monotonic() > due else None
        if not trouble:
            return None
        kind, rank_0 = "dead" if "ended" in trouble else "silent", self._rank_0
        where = f"rank 0 (host {rank_0.host}) after step {rank_0.step} in {rank_0.phase}"
        own = f"rank {self._rank} is after step {self._status.step} in {self._status.phase}"
        return LostRanks(kind, (0,), rank_0, f"{kind}: {where}, which watches: {trouble}; {own}")

    def _send(self, message: dict[str, Any]) -> None:
        with self._send_lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> None:
        """Take what rank 0 has sent. Raises TimeoutError, and OSError where the connection has ended."""
        received = self._connection.recv(1 << 16)
        if not received:
            raise ConnectionError("closed")
        self._last_received = time.monotonic()
        *lines, self._received = (self._received + received).split(b"\n")
        for message in map(json.loads, lines):
            if "rank_0" in message:
                self._rank_0 = Heartbeat(**message["rank_0"])
            elif "lost" in message:
                fields = message["lost"]
                last = Heartbeat(**fields["last"])
                lost = LostRanks(fields["kind"], tuple(fields["ranks"]), last, fields["message"], fields["code"])
                self._failed = (0.0, lost)
            elif "failed" in message:
                last = Heartbeat(**message["failed"])
                text = f"failed: rank {last.rank} (host {last.host}) after step {last.step} in {last.phase}"
                lost = LostRanks("failed", (last.rank,), last, f"{text}: {message['error']}", message["code"])
                self._failed = (time.monotonic() + GRACE_SECONDS, lost)


def _has_ended(use: Callable[[], None]) -> bool:
    """Whether using the connection shows that it has ended."""
    try:
        use()
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def watchdog(config: RunConfig, run_dir: Path) -> Iterator[RankStatus]:
    """Watch this rank inside the `with`, where it is not alone. A collective, also at an end without an exception."""
    status = RankStatus()
    if distributed.world_size() == 1:
        yield status
        return
    settings, server = config.system.watch, None
    address, token = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_hex(16)
    if distributed.is_first():
        monitor = RankMonitor(
            distributed.world_size(), settings.silent_seconds, settings.stuck_seconds, time.monotonic()
        )
        server = WatchdogServer(monitor, token, address)
        server.start()
    port, token = distributed.broadcast_object((server.port if server else 0, token))
    connection = socket.create_connection((address, port), timeout=settings.silent_seconds)
    client = WatchdogClient(
        connection, distributed.rank(), status, settings, lambda lost: end_over_lost_ranks(lost, run_dir)
    )
    client.start(token)
    try:
        yield status
    except BaseException as error:
        if distributed.is_caused_by_other_rank(error):
            client.wait_for_lost_ranks()
        kind = error.kind if isinstance(error, TrainingFailed) else type(error).__name__
        record_failure(run_dir, FailureRecord(distributed.rank(), status.step, status.phase, kind, str(error)))
        client.close(failed=f"{type(error).__name__}: {error}", code=exit_code_of(error))
        raise
    else:
        client.close()
        distributed.barrier()  # rank 0 still answers the others until they have said goodbye
    finally:
        if server is not None:
            server.close()


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a run that this error ends."""
    if isinstance(error, UserError):
        return MISTAKE
    return FAILED if isinstance(error, TrainingFailed) else LOST_RANK


def end_over_lost_ranks(lost: LostRanks, run_dir: Path) -> None:
    """Print which rank is lost and end this process at once: its main thread may wait for that rank for ever.

    Where no rank advances, each prints the lines of code it is at: all may be in one phase, as when they build the
    task.
    """
    print_error(f"error: rank {distributed.rank()} ends, a rank is lost: {lost.message}")
    if lost.kind == "stuck":
        with suppress(OSError, ValueError, RuntimeError):  # a stderr that is no file must not keep the process alive
            faulthandler.dump_traceback()
    if distributed.rank() == min(set(range(distributed.world_size())) - set(lost.ranks), default=0):
        last = lost.last
        record_failure(
            run_dir, FailureRecord(lost.ranks[0], last.step, last.phase, lost.kind, lost.message, host=last.host)
        )
    os._exit(lost.code)
