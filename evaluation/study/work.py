"""Works through a study: cell by cell, the cheapest budget first, beside any number of processes that do the same.

    work(layout, cells, Session(deadline=None, threads=1), say=print)       # Tally(done=..., failed=..., busy=..., ...)

What all cells need is made by whoever comes first while the others wait. A cell that another process is at is passed
over; one that fails is recorded with its log, and the rest goes on. A failure counts for the session in which it
happened: processes that were started before leave it alone, the next command tries again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs import UserError
from data.durable_files import write_atomic
from engine.lock import file_lock, lock_holder
from evaluation.study.carry_out import Session, carry_out, is_done
from evaluation.study.preset import Cell
from evaluation.study.stages import Layout, Stage

FAILED = "failed.json"
TAIL_LINES = 3  # of a log, shown with a failure
ERROR = re.compile(r"error: |[\w.]*(Error|Exception)\b: ")  # ours, and the end of a traceback


@dataclass
class Tally:
    """Names of cells by what became of them."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)  # by the time limit, or not reached before it
    busy: list[str] = field(default_factory=list)  # in other processes


def work(
    layout: Layout,
    cells: Sequence[Cell],
    session: Session,
    say: Callable[[str], None],
    after_cell: Callable[[], object] = lambda: None,
    after_corpus: Callable[[], object] = lambda: None,
) -> Tally:
    """All cells once, `after_cell` behind each, `after_corpus` once the corpus is there. Raises UserError where what
    they share cannot be made."""
    began, tally = time.time(), Tally()
    if not _share(layout, session, say, after_corpus):
        tally.stopped += [cell.name for cell in cells]
        return tally
    for cell in cells:
        if all(is_done(layout.cell(cell), stage) for stage in layout.stages(cell)):
            tally.done.append(cell.name)
            continue
        if session.is_over:
            tally.stopped.append(cell.name)
            continue
        with file_lock(layout.lock(cell.name)) as lock:
            if lock is None:
                say(f"{cell.name}: {lock_holder(layout.lock(cell.name))} is at it")
                tally.busy.append(cell.name)
                continue
            getattr(tally, _cell(layout, cell, lock, session, began, say)).append(cell.name)
        after_cell()
    return tally


def failure(folder: Path) -> dict[str, object] | None:
    """What is recorded of a cell that failed: stage, exit code, log."""
    path = folder / FAILED
    return json.loads(path.read_text()) if path.exists() else None


def _share(layout: Layout, session: Session, say: Callable[[str], None], after_corpus: Callable[[], object]) -> bool:
    """Whether corpus and features are there, now."""
    stages = layout.shared()
    with file_lock(layout.lock("shared"), wait=math.inf) as lock:
        assert lock is not None
        for stage in stages:
            if not is_done(layout.out, stage):
                say(f"shared: {stage.name}")
            outcome = carry_out(stage, layout.out, lock, session)
            if outcome == "failed":
                log = layout.out / "logs" / f"{stage.name}.log"
                raise UserError(f"{stage.name} failed, and every cell needs it: {last_words(log)}; see {log}")
            if outcome == "stopped":
                return False
            if stage.name == "corpus":
                after_corpus()
    return True


def _cell(layout: Layout, cell: Cell, lock: int, session: Session, began: float, say: Callable[[str], None]) -> str:
    """Carries out a cell's stages as far as they go; the name of its list in the Tally."""
    folder = layout.cell(cell)
    record = folder / FAILED
    if record.exists() and record.stat().st_mtime > began:
        return "failed"
    record.unlink(missing_ok=True)
    for stage in layout.stages(cell):
        if session.is_over:
            return "stopped"
        started = time.monotonic()
        outcome = carry_out(stage, folder, lock, session)
        if outcome != "skipped":
            say(f"{cell.name}: {stage.name} {outcome} after {time.monotonic() - started:.0f} s")
        if outcome == "failed":
            _record_failure(folder, stage, say)
        if outcome in ("failed", "stopped"):
            return outcome
    return "done"


def _record_failure(folder: Path, stage: Stage, say: Callable[[str], None]) -> None:
    log = folder / "logs" / f"{stage.name}.log"
    words = last_words(log)
    failed = {"stage": stage.name, "log": str(log), "last_words": words}
    write_atomic(folder / FAILED, json.dumps(failed, indent=2) + "\n")
    say(f"{folder.name}: {words} ({log})")


def last_words(log: Path) -> str:
    """The last line that names an error, if there is one, else the last few."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return errors[-1] if errors else " | ".join(lines[-TAIL_LINES:])
