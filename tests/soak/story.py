"""The disturbed run: does the faults of the schedule to it, one after another, and writes down what came of each.

    story = disturb(run, schedule(seed=0, ranks=2), seconds=1800.0)
    story.events[0]     # Event(minutes=1.4, kind="kill", step=230, good=225, resumed=225, ...)

In the last third of the time nothing more ends a process: only what grows slowly is looked for there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.checkpoint.directory import resume_candidates, step_of
from engine.exits import STOPPED
from tests.soak import faults
from tests.soak.processes import end_all, marked, ranks
from tests.soak.run import REPORT_EVERY, SAVE_EVERY, WAIT_SECONDS, Run, SoakFailed
from tests.soak.schedule import Fault

LOSING_SHARE = 2 / 3  # of the time, in which processes may end
NEVER_SECONDS = 1e5  # the undisturbed run takes as long as it takes


@dataclass
class Event:
    """A fault and what came of it. `step` is the last one reported before it, `good` that of the newest checkpoint that
    it left whole, `resumed` the one that the run went on from; `seconds` pass from the fault to the next report."""

    minutes: float
    kind: str
    is_losing: bool
    words: str
    step: int
    good: int
    resumed: int
    seconds: float
    is_outside: bool = False  # the supervisor had ended too

    @property
    def steps_again(self) -> int:
        """How many reported steps were done a second time."""
        return max(0, self.step - self.resumed) if self.is_losing else 0


@dataclass
class Story:
    """A whole disturbed run."""

    events: list[Event] = field(default_factory=list)
    exit_code: int = -1
    processes_left: int = 0  # at the end
    began: float = 0.0  # time.time()


def disturb(run: Run, schedule: Iterable[Fault], seconds: float, say: Callable[[str], None]) -> Story:
    """Lets the run go on for so long, or until the schedule ends, and asks it to stop.

    Raises SoakFailed where it does not get over a fault.
    """
    story, began = Story(began=time.time()), time.monotonic()
    run.start()
    run.wait_for_report(0.0)
    for fault in schedule:
        left = began + seconds - time.monotonic()
        if left <= fault.after_seconds:
            time.sleep(max(0.0, left))
            break
        if fault.is_losing and left < (1 - LOSING_SHARE) * seconds:
            continue
        time.sleep(fault.after_seconds)
        event = _meet(run, fault, (time.monotonic() - began) / 60)
        story.events.append(event)
        say(f"{event.minutes:5.1f} min  step {event.step:5}  {event.words}; {_outcome(event)}")
    _wait_until(lambda: bool(_regular(run)), run, "a checkpoint")
    run.ask_to_stop()
    story.exit_code, story.processes_left = run.wait_for_end(), len(marked(run.mark))
    return story


def compared(
    disturbed: Run, undisturbed: Run, schedule: Iterable[Fault], seconds: float, say: Callable[[str], None]
) -> Story:
    """The disturbed run, and after it the undisturbed one up to the last step of which both have a checkpoint."""
    try:
        story = disturb(disturbed, schedule, seconds, say)
        say(f"it came to step {(disturbed.last_report() or {})['step']}; now the same undisturbed")
        _follow(undisturbed, _regular(disturbed)[0])
    finally:
        end_all(disturbed.mark)
        end_all(undisturbed.mark)
    return story


def _follow(run: Run, step: int) -> None:
    run.start()
    _wait_until(lambda: step in _saved(run), run, f"step {step}", NEVER_SECONDS)
    run.ask_to_stop()
    run.wait_for_end()


def _regular(run: Run) -> list[int]:
    """Those that an undisturbed run has too."""
    return [step for step in _saved(run) if step % SAVE_EVERY == 0]


def _saved(run: Run) -> list[int]:
    """Steps of the checkpoints that a run could go on from, newest first."""
    return [step_of(path) for path in resume_candidates(run.checkpoints)]


def _outcome(event: Event) -> str:
    if not event.is_losing:
        return f"next report after {event.seconds:.1f} s"
    return f"went on from step {event.resumed}, next report after {event.seconds:.1f} s"


def _meet(run: Run, fault: Fault, minutes: float) -> Event:
    before, last = ranks(run.mark), run.last_report()
    step, began = (last or {"step": 0})["step"], time.time()
    there = _saved(run)
    words = faults.do(fault, run)
    left = there[1:] if fault.kind == "spoil" else there
    event = Event(minutes, fault.kind, fault.is_losing, words, step, max(left, default=0), 0, 0.0)
    if not fault.is_losing:
        run.wait_for_report(time.time())
        if ranks(run.mark) != before:
            raise SoakFailed(f"{words}: a process ended, which it should survive; see {run.log}")
    else:
        event.is_outside = fault.kind in ("crash", "preempt")
        if event.is_outside:
            _start_again(run, fault)
        _wait_for_new_ranks(run, before)
        event.resumed = run.wait_for_report(time.time())["step"] - REPORT_EVERY
    event.seconds = time.time() - began
    return event


def _start_again(run: Run, fault: Fault) -> None:
    code = run.wait_for_end()
    if fault.kind == "preempt" and code != STOPPED:
        raise SoakFailed(f"the supervisor was asked to stop and ended with code {code}, not {STOPPED}; see {run.log}")
    run.start()


def _wait_for_new_ranks(run: Run, before: dict[int, int]) -> None:
    def are_there() -> bool:
        now = ranks(run.mark)
        return len(now) == run.ranks and not set(now.values()) & set(before.values())

    _wait_until(are_there, run, "a start of all ranks")


def _wait_until(holds: Callable[[], bool], run: Run, what: str, seconds: float = WAIT_SECONDS) -> None:
    """Raises SoakFailed where it does not come in so long, or the supervisor ends first."""
    until = time.monotonic() + seconds
    while not holds():
        if not run.is_alive:
            raise SoakFailed(f"the supervisor has ended (code {run.wait_for_end()}); see {run.log}")
        if time.monotonic() > until:
            raise SoakFailed(f"no {what.removeprefix('a ')} within {seconds:g} s; see {run.log}")
        time.sleep(0.2)
