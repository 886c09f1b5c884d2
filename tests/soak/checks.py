"""What a soak has to show, each as one sentence that is true or not.

for check in checks(disturbed, undisturbed, story, lives):
    print(check)                    # "holds   weights: 41 checkpoints are those of the undisturbed run, bit for bit"
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.checkpoint.directory import complete_checkpoints
from engine.exits import STOPPED
from tests.soak.gauges import Life, slope
from tests.soak.run import REPORT_EVERY, Run
from tests.soak.story import Story

WARM_UP_SECONDS = 180.0  # of a process: pools of threads fill, allocators take what they will keep
SHORTEST = 60.0  # seconds after it: of less nothing can be said
MOST_GROWTH = 0.02  # of what a process holds, over the time it was looked at
EXACT = ("loss/", "optim/")  # figures of a report that must be the same to the last bit


@dataclass(frozen=True)
class Check:
    name: str
    holds: bool
    words: str

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'BROKEN'}  {self.name}: {self.words}"


def checks(disturbed: Run, undisturbed: Run, story: Story, lives: Sequence[Life]) -> list[Check]:
    """All of them, whatever the first ones say."""
    return [
        _weights(disturbed, undisturbed),
        _samples(disturbed, undisturbed),
        _reports(disturbed, undisturbed),
        _windows(story),
        *_flat(lives),
        _nothing_left(disturbed, story),
    ]


def common(disturbed: Run, undisturbed: Run) -> list[tuple[Path, Path]]:
    """Checkpoints after the same step, by step."""
    theirs = {path.name: path for path in complete_checkpoints(undisturbed.checkpoints)}
    return [(path, theirs[path.name]) for path in complete_checkpoints(disturbed.checkpoints) if path.name in theirs]


def _weights(disturbed: Run, undisturbed: Run) -> Check:
    pairs = common(disturbed, undisturbed)
    wrong = [f"{mine.name}/{name}" for mine, theirs in pairs for name in _differing(mine, theirs)]
    words = f"{len(pairs)} checkpoints, up to {pairs[-1][0].name if pairs else '-'}: weights, moments and teacher are "
    words += f"those of the undisturbed run, bit for bit{'; not so ' if wrong else ''}{', '.join(wrong[:8])}"
    return Check("weights", bool(pairs) and not wrong, words)


def _differing(mine: Path, theirs: Path) -> list[str]:
    found = []
    for file in sorted(path.name for path in theirs.glob("*.safetensors")):
        one, other = load_file(mine / file), load_file(theirs / file)
        found += [name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name))]
    return found


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _samples(disturbed: Run, undisturbed: Run) -> Check:
    pairs = [
        tuple(json.loads((path / "state.json").read_text())["samples_digest"] for path in pair)
        for pair in common(disturbed, undisturbed)
    ]
    wrong = sum(mine != theirs for mine, theirs in pairs)
    words = f"{len(pairs)} checkpoints were made of the same samples in the same steps, none lost, none repeated"
    return Check("samples", bool(pairs) and not wrong, f"{words}{f'; not so {wrong}' if wrong else ''}")


def _reports(disturbed: Run, undisturbed: Run) -> Check:
    """The last report of each step counts: what came before it was thrown away."""
    mine, theirs = ({report["step"]: report for report in run.reports()} for run in (disturbed, undisturbed))
    last = max(mine)
    missing = [step for step in range(REPORT_EVERY, last + 1, REPORT_EVERY) if step not in mine]
    both = sorted(mine.keys() & theirs.keys())
    wrong = [step for step in both if _figures(mine[step]) != _figures(theirs[step])]
    words = f"{len(mine)} reports up to step {last}, {len(missing)} missing; losses, gradient norms and rates of "
    words += f"{len(both)} are those of the undisturbed run, to the last digit"
    words += f"; not so those of steps {wrong[:8]}" if wrong else ""
    return Check("log", bool(both) and not missing and not wrong, words)


def _figures(report: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in report.items() if name.startswith(EXACT)}


def _windows(story: Story) -> Check:
    losing = [event for event in story.events if event.is_losing]
    wrong = [event for event in losing if event.resumed < event.good]
    again = [event.steps_again for event in losing]
    words = f"after {len(losing)} losses the run went on from the newest good checkpoint, or a later one; "
    words += f"{sum(again)} reported steps were done again, at most {max(again, default=0)} at once"
    words += "".join(f"; not so after {event.words} at {event.minutes:.1f} min" for event in wrong)
    return Check("window", not wrong, words)


def _flat(lives: Sequence[Life]) -> Iterator[Check]:
    """Of each role the process that lived longest; those that lived too short say nothing."""
    for role in sorted({life.role for life in lives} - {"other"}):
        life = max((life for life in lives if life.role == role), key=lambda life: life.seconds)
        if life.seconds >= WARM_UP_SECONDS + SHORTEST:
            yield _flat_life(life)


def _flat_life(life: Life) -> Check:
    readings = life.after(WARM_UP_SECONDS)
    # Medians of both halves: a checkpoint that is being written has files open for a moment.
    minutes = (readings[-1].seconds - readings[0].seconds) / 60
    rising, size = slope(readings), readings[-1].rss_mib
    half = len(readings) // 2
    files, threads = (
        [statistics.median(reading[field] for reading in part) for part in (readings[:half], readings[half:])]
        for field in (2, 3)
    )
    is_flat = rising * minutes <= MOST_GROWTH * size and files[1] <= files[0] and threads[1] <= threads[0]
    words = f"{size:.0f} MiB, {rising:+.3f} MiB a minute over {minutes:.1f} minutes; "
    words += f"open files {files[0]:g}, then {files[1]:g}; threads {threads[0]:g}, then {threads[1]:g}"
    return Check(life.role, is_flat, words)


def _nothing_left(disturbed: Run, story: Story) -> Check:
    drafts = [path.name for path in disturbed.checkpoints.glob(".*")]
    words = (
        f"asked to stop, it ended with code {story.exit_code}; processes left: {story.processes_left}, drafts left: "
    )
    holds = story.exit_code == STOPPED and not story.processes_left and not drafts
    return Check("end", holds, f"{words}{len(drafts)}")
