"""A run of the engine as an operator keeps it: supervised, started again from outside when even that ended.

run = Run(folder, shards, ranks=2, mark="4711", seed=0)
run.start()
run.wait_for_step(100)
run.ask_to_stop()
run.wait_for_end()              # 143
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.engine.small_runs import LAUNCH, ROOT
from tests.soak.processes import MARK

REPORT_EVERY, SAVE_EVERY = 5, 25  # steps
SILENT_SECONDS = 10.0
STUCK_SECONDS = 120.0
NEVER = 10**6  # steps: a soak ends by the clock
TAIL_BYTES = 1 << 16  # of log.jsonl: several reports
WAIT_SECONDS = 300.0  # for a step to come, recovery included; far above what it takes


class SoakFailed(Exception):
    """What must not happen has happened."""


@dataclass
class Run:
    """`is_disturbed`: its storage fails now and then. Both kinds are supervised alike."""

    folder: Path
    shards: Path
    ranks: int
    mark: str
    seed: int
    is_disturbed: bool = True
    keep_every: int = 0  # steps: of every so many a checkpoint stays for comparing
    silent_seconds: float = SILENT_SECONDS
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _copying: threading.Thread | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """What the processes printed, start after start."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def start(self) -> None:
        """Starts the supervisor, which starts the rest."""
        self.starts += 1
        environment = os.environ | {MARK: self.mark, "VTP_SOAK_SEED": str(self.seed), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            self._command(), env=environment, cwd=self.folder.parent, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        # A pipe, not the file: what becomes of files when the disk is full must not become of what is printed.
        assert self._process.stdout is not None
        self._copying = threading.Thread(target=_copy, args=(self._process.stdout, self.log), daemon=True)
        self._copying.start()

    def ask_to_stop(self) -> None:
        if self.is_alive:
            assert self._process is not None
            self._process.send_signal(signal.SIGTERM)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_for_end(self) -> int:
        """The supervisor's exit code."""
        assert self._process is not None
        assert self._copying is not None
        code = self._process.wait(WAIT_SECONDS)
        self._copying.join(WAIT_SECONDS)
        return code

    def reports(self) -> list[dict[str, Any]]:
        """What the run has reported so far, steps that were done again included."""
        file = self.folder / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [report for report in map(_report, lines) if report is not None]

    def last_report(self) -> dict[str, Any] | None:
        """The newest one, by the end of the file: it is asked for several times a second."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return None
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = log.read().split(b"\n")
        # The first may be the end of a line, the last the beginning of one.
        return next((report for report in map(_report, reversed(lines)) if report is not None), None)

    def wait_for_report(self, since: float) -> dict[str, Any]:
        """The first report after `since` (time.time())."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            if (report := self.last_report()) is not None and report["time"] > since:
                return report
            if not self.is_alive:
                raise SoakFailed(f"the supervisor has ended (code {self.wait_for_end()}); see {self.log}")
            time.sleep(0.2)
        raise SoakFailed(f"no report for {WAIT_SECONDS:g} s; see {self.log}")

    def _command(self) -> list[str]:
        deepspeed = Path(sys.executable).parent / "deepspeed"
        launcher = [str(deepspeed), "--num_accelerators", str(self.ranks), "--master_port", str(_free_port())]
        launcher += [str(ROOT / "tests/soak/rank.py")] if self.is_disturbed else []
        settings = {
            "data.train": f"[{self.shards}/train-*.tar]", "data.held_out": f"[{self.shards}/held_out-*.tar]",
            "data.tokenizer": self.shards / "tokenizer.json",
            "data.streams": self.ranks, "batch.clip": 12, "batch.ssl": 12, "batch.rec": 12,  # for 2, 3 and 4 ranks
            "model.text.vocab": 2048, "model.text.context": 32, "optim.steps": NEVER,
            "system.run_dir": self.folder, "system.report_every": REPORT_EVERY, "system.images_every": 200,
            "system.checkpoint.every": SAVE_EVERY, "system.checkpoint.keep_every": self.keep_every,
            "system.watch.silent_seconds": SILENT_SECONDS, "system.watch.stuck_seconds": STUCK_SECONDS,
        }  # fmt: skip
        supervised = [str(LAUNCH), "--max-restarts", "5", "--launcher", shlex.join(launcher), "--resume", "auto"]
        return [sys.executable, *supervised, "--config", str(ROOT / "tests/tiny.yaml"),
                *(f"{key}={value}" for key, value in settings.items())]  # fmt: skip


def _report(line: str | bytes) -> dict[str, Any] | None:
    """None for what is no whole line: a killed run can leave half of one."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found


def _copy(source: IO[bytes], path: Path) -> None:
    with source, path.open("ab") as file:
        while data := source.read1(1 << 16):  # type: ignore[attr-defined]
            file.write(data)
            file.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
