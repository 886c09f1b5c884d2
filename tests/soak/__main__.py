"""Runs the engine for half an hour under faults, then undisturbed up to the same step, and compares.

    make soak                                                   # 30 minutes, and what the undisturbed run takes
    python -m tests.soak --minutes 5 --ranks 3 --seed 7 --out runs/soak

    OUT/disturbed/  undisturbed/  *.log  soak.json  progress.png  memory.png

The faults are those of tests/soak/schedule.py, drawn by the seed; storage fails a request in a thousand all the time.
Exit code 1 where a check is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import corpus
from tests.soak.checks import Check, checks
from tests.soak.figures import draw
from tests.soak.gauges import Gauges, Life
from tests.soak.run import SAVE_EVERY, Run, SoakFailed
from tests.soak.schedule import schedule
from tests.soak.story import Story, compared

SAMPLES = 3000


def soak(minutes: float, ranks: int, seed: int, out: Path) -> list[Check]:
    """All of it; what it found also lies in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    shards = _corpus(out / "shards")
    mark = f"{os.getpid()}-{seed}"
    disturbed = Run(out / "disturbed", shards, ranks, f"{mark}-d", seed, keep_every=8 * SAVE_EVERY)
    undisturbed = Run(out / "undisturbed", shards, ranks, f"{mark}-u", seed, is_disturbed=False, keep_every=SAVE_EVERY)
    with Gauges(disturbed.mark) as gauges:
        story = compared(disturbed, undisturbed, schedule(seed, ranks), 60 * minutes, _say)
    found = checks(disturbed, undisturbed, story, gauges.lives)
    told = _told(minutes, ranks, seed, story, gauges.lives, found, undisturbed)
    (out / "soak.json").write_text(json.dumps(told, indent=2) + "\n")
    if held_up := told["checkpoint_stall_ms_and_share"]:
        _say(f"a save holds the steps up for {held_up[0]:.1f} ms, {held_up[1]:.2%} of the time between two")
    draw(disturbed, undisturbed, story, gauges.lives, out)
    return found


def _corpus(folder: Path) -> Path:
    asked = ["synthetic", "--out", str(folder), "--samples", str(SAMPLES), "--held-out", "64", "--size", "32"]
    if corpus.main([*asked, "--shard-size", "250"]):
        raise SoakFailed("the corpus could not be made")
    return folder


def stall(run: Run) -> tuple[float, float] | None:
    """Milliseconds for which the steps waited for a save, and their share of the time between two saves: medians.

    Of a run that was never started again. It saves every few seconds, a real one every few hours. None for one save.
    """
    saves = [report for report in run.reports() if report.get("checkpoint/failed") == 0]
    waits = [report["checkpoint/stall_ms"] for report in saves[1:]]
    shares = [
        wait / (1e3 * (save["time"] - before["time"]))
        for wait, save, before in zip(waits, saves[1:], saves, strict=False)
    ]
    return (statistics.median(waits), statistics.median(shares)) if waits else None


def _told(
    minutes: float, ranks: int, seed: int, story: Story, lives: Sequence[Life], found: Sequence[Check], undisturbed: Run
) -> dict[str, Any]:
    losing = [event for event in story.events if event.is_losing]
    return {
        "minutes": minutes,
        "ranks": ranks,
        "seed": seed,
        "faults": Counter(event.kind for event in story.events),
        "seconds_to_recover": {
            kind: statistics.median(event.seconds for event in losing if event.kind == kind)
            for kind in sorted({event.kind for event in losing})
        },
        "steps_done_again": sum(event.steps_again for event in losing),
        "checkpoint_stall_ms_and_share": stall(undisturbed),
        "checks": [asdict(check) for check in found],
        "events": [asdict(event) for event in story.events],
        "began": story.began,
        "processes": [asdict(life) for life in lives],
    }


def _say(words: str) -> None:
    print(words, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Soak the engine under random faults.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the disturbed run (%(default)s)")
    parser.add_argument("--ranks", type=int, choices=(2, 3, 4), default=2, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="emptied first (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        found = soak(options.minutes, options.ranks, options.seed, options.out.absolute())
    except SoakFailed as error:
        _say(f"BROKEN  {error}")
        return 1
    for check in found:
        _say(str(check))
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
