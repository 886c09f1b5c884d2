"""Read a run directory as it is: killed in the middle of a line, resumed, half full, or whole.

    run = read_run(Path("runs/demo"))       # UserError where there is no log.jsonl with a report in it
    run.steps                               # [10, 20, ...]: of two lines for one step, the later one counts
    run.series("loss/clip")                 # [4.5, 3.9, ...], None where a report has no such metric
    run.notes                               # ["line 41 of log.jsonl is no report (cut short?): left out"]

Only log.jsonl is needed; what else is missing is None or empty here, and the page says so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs import Config, UserError, load_run
from configs.run import RunConfig as AnyRunConfig

_STEP_LINE = re.compile(r"step \d+/\d+  ")
_PEAK = re.compile(r"peak memory of this rank: ([\d.]+) GiB")
_STOPPED = re.compile(r"asked to stop: (\d+) of")
_NUMBERED = re.compile(r"(.+?)-(\d+)$")
_NO_FIGURES = ("step", "time")
_LARGEST_STEP = 2**53


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run directory."""

    directory: Path
    reports: dict[int, dict[str, float]]  # metrics by finished step, in the order of the steps
    times: list[float]  # seconds since 1970 of every line that was read, in the order of the file
    steps_back: list[tuple[int, int]]  # (last step, next step) where the log goes back: a resume
    config: AnyRunConfig | None  # None: missing, or of another version; the text below may exist all the same
    config_text: str | None
    ds_config_text: str | None
    choices: dict[str, str] | None  # what every "auto" became, and why
    machine: dict[str, Any] | None  # what one rank computes on, and its peaks
    messages: list[str]  # the lines of log.txt that are no reports
    evaluation: dict[str, Any] | None
    bad_samples: list[dict[str, Any]] | None
    pictures: dict[str, list[Path]]  # by kind, in the order of the steps
    notes: list[str]  # what could not be read

    @property
    def pretraining(self) -> Config | None:
        """The config if it is known. Raises UserError unless of pre-training, for which FLOPs and bytes are counted."""
        if self.config is not None and not isinstance(self.config, Config):
            raise UserError(f"it is counted for pre-training alone, and this run is of kind {self.config.kind}")
        return self.config

    @property
    def steps(self) -> list[int]:
        """Finished steps at each report, rising."""
        return list(self.reports)

    @property
    def keys(self) -> list[str]:
        """Every metric's name, in order of first appearance."""
        return list(dict.fromkeys(key for report in self.reports.values() for key in report))

    def series(self, key: str) -> list[float | None]:
        """The metric at every report; None where a report lacks it."""
        return [report.get(key) for report in self.reports.values()]

    def finite(self, key: str) -> list[float]:
        """The metric's finite values, in order."""
        return [value for value in self.series(key) if value is not None and math.isfinite(value)]

    def first(self, key: str) -> float | None:
        """The first value, NaN and infinities included."""
        return next((value for value in self.series(key) if value is not None), None)

    def last(self, key: str) -> float | None:
        """The last value, NaN and infinities included."""
        return next((value for value in reversed(self.series(key)) if value is not None), None)

    def median(self, key: str) -> float | None:
        """The median of the finite values."""
        values = self.finite(key)
        return statistics.median(values) if values else None

    @property
    def peak_gib(self) -> float | None:
        """The peak that the first rank logged at its end; None where it logged none."""
        found = [match for line in self.messages if (match := _PEAK.match(line))]
        return float(found[-1][1]) if found else None

    @property
    def ds_config(self) -> dict[str, Any] | None:
        """ds_config.json parsed; None where it is no JSON object."""
        try:
            record = json.loads(self.ds_config_text or "")
        except (ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    @property
    def world_size(self) -> int | None:
        """Number of ranks, by machine.json or by the batch sizes in ds_config.json; None where neither has it."""
        named = (self.machine or {}).get("world_size")
        if isinstance(named, int) and named >= 1:
            return named
        ds_config = self.ds_config or {}
        try:
            per_rank = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"]
            ranks = ds_config["train_batch_size"] / per_rank
            whole = int(ranks)
        except (ValueError, KeyError, TypeError, ArithmeticError):
            return None
        return whole if whole >= 1 and ranks == whole else None

    @property
    def stops(self) -> list[int]:
        """Steps at which the run was stopped by request, after a checkpoint."""
        return [int(match[1]) for line in self.messages if (match := _STOPPED.match(line))]


def read_run(directory: Path) -> RunRecord:
    """Read a run directory. Raises UserError where log.jsonl is missing or has no report in it."""
    notes: list[str] = []
    lines, times = _log_lines(directory, notes)
    later_wins = dict(lines)
    config, config_text = _config(directory / "config.yaml", notes)
    steps = [step for step, _ in lines]
    bad_log = directory / "bad_samples.jsonl"
    return RunRecord(
        directory=directory,
        reports={step: later_wins[step] for step in sorted(later_wins)},
        times=times,
        steps_back=[(last, after) for last, after in pairwise(steps) if after <= last],
        config=config,
        config_text=config_text,
        ds_config_text=_text(directory / "ds_config.json"),
        choices=_string_values(directory / "choices.json", notes),
        machine=_json_object(directory / "machine.json", notes),
        messages=[line for line in (_text(directory / "log.txt") or "").splitlines() if not _STEP_LINE.match(line)],
        evaluation=_json_object(directory / "evaluation.json", notes),
        bad_samples=None if (text := _text(bad_log)) is None else _json_lines(text, bad_log.name, notes),
        pictures=_pictures(directory / "pictures"),
        notes=notes,
    )


def _log_lines(directory: Path, notes: list[str]) -> tuple[list[tuple[int, dict[str, float]]], list[float]]:
    path = directory / "log.jsonl"
    text = _text(path)
    if text is None:
        raise UserError(f"{directory} has no log.jsonl: a report is made of a run directory; name one, runs/NAME")
    lines, times = [], []
    for record in _json_lines(text, path.name, notes):
        step = record.get("step")
        if not isinstance(step, int) or not 0 <= step < _LARGEST_STEP:
            notes.append(f"a line of log.jsonl has the step {str(step)[:40]!r}: left out")
            continue
        figures = {key: figure for key, value in record.items() if (figure := number(value)) is not None}
        lines.append((step, {key: value for key, value in figures.items() if key not in _NO_FIGURES}))
        times.append(figures.get("time", math.nan))
    if not lines:
        raise UserError(
            f"{path} has no report in it: a run writes its first after system.report_every steps; wait for that"
        )
    return lines, times


def number(value: object) -> float | None:
    """A value as a float; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _json_lines(text: str, name: str, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; adds a note for a line that is none."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            notes.append(f"line {number} of {name} is no report (cut short?): left out")
        elif record:
            found.append(record)
    return found


def _json_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        notes.append(f"{path.name} is no JSON object: left out")
        return None
    return record


def _string_values(path: Path, notes: list[str]) -> dict[str, str] | None:
    record = _json_object(path, notes)
    return None if record is None else {key: str(value) for key, value in record.items()}


def _config(path: Path, notes: list[str]) -> tuple[AnyRunConfig | None, str | None]:
    text = _text(path)
    if text is None:
        return None, None
    try:
        return load_run(path), text
    except UserError as error:
        notes.append(f"config.yaml is not one of this version, so it is shown as text alone: {error}")
        return None, text


def _text(path: Path) -> str | None:
    """The file's text, invalid bytes replaced; None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """pictures/KIND-STEP.png by kind; a file without a number is a kind of its own."""
    numbered = []
    for path in sorted(folder.glob("*.png")):
        match = _NUMBERED.fullmatch(path.stem)
        numbered.append((match[1], int(match[2]), path) if match else (path.stem, 0, path))
    kinds = dict.fromkeys(kind for kind, _, _ in numbered)
    return {kind: [path for other, _, path in sorted(numbered) if other == kind] for kind in kinds}
