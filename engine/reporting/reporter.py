"""Reports and log messages of a run: sent to every sink (engine/reporting/sinks.py), checked for alarms.

    with open_reporter(Path("runs/demo"), total_steps=300, first_step=0, is_main=True) as reporter:
        reporter.scalars(10, {"loss/total": 7.1, "speed/samples_per_second": 55.0})
        reporter.message("saved checkpoints/step-00000010")
    alarms = ReportAlarms(alarm_rules(config), log=reporter.message)
    alarms.read(step, {"health/teacher_entropy": 0.1, ...})    # {"health/alarm/teacher_entropy": 1.0, ...}, and logs it

Only the main rank writes; the others get a Reporter without sinks. A report is a step number and a flat dict of floats,
named with slashes as TensorBoard groups them ("loss/clip", "speed/samples_per_second").

No report ends a run: an error of a sink, or in `attempt`, is one log line. A file that cannot be written (a full disk)
is named once, with the reason, and once more when it is written again, waiting lines first.

An alarm is one line when a scalar leaves its range (system.checks.alarms), and one when it is back. It is back when it
is a tenth inside: one that wavers around the limit is logged once. Nothing acts on an alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs import Config, RunConfig
from configs.load import one_line
from data.durable_files import write_atomic
from engine.reporting.sinks import GrowingFile, LogFiles, Sink, TensorBoard, Terminal
from engine.stderr import print_error

_MARGIN = 0.1  # of a limit: how far inside the range ends an alarm


class Reporter:
    """Send each report to every sink; log which files cannot be written, `logs` that others write to among them."""

    def __init__(self, sinks: Sequence[Sink], logs: Sequence[GrowingFile] = ()) -> None:
        self._sinks, self._logs = sinks, logs
        self._files = [*logs, *(file for sink in sinks for file in sink.files)]
        self._failing: set[Path] = set()
        self._raised: set[tuple[type[Sink], type[Exception]]] = set()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send one report; `step` counts finished steps."""
        for log in self._logs:
            log.flush()
        self._for_each_sink(lambda sink: sink.scalars(step, values))
        self._log_failing_files()

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Send a (3, H, W) image in [0, 1], as it was after `step` steps."""
        self._for_each_sink(lambda sink: sink.image(step, name, image))

    def message(self, text: str) -> None:
        """Send a sentence to the log and the terminal."""
        self._for_each_sink(lambda sink: sink.message(text))

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Run `work`, which the run can do without; log an error as one line, "could not `what`: ...".

        `work` must not contain a collective: after an error the other ranks would wait in it.
        """
        try:
            work()
        except Exception as error:
            self.message(f"could not {what}: {type(error).__name__}: {one_line(error)}")

    def write_file(self, path: Path, content: str | bytes) -> None:
        """Write a file that the run can do without, on the main rank; log where it cannot be written."""
        if not self._sinks:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, is_synced=False)
        except OSError as error:
            self.message(f"could not write {path}: {error.strerror or error}")
        except ValueError as error:  # text that UTF-8 cannot encode
            self.message(f"could not write {path}: {one_line(error)}")

    def close(self) -> None:
        """Try once more to write what waits; log what is lost."""
        for log in self._logs:
            log.flush()
        self._for_each_sink(lambda sink: sink.close())
        for file in self._files:
            if file.trouble:
                self.message(f"cannot write {file.trouble}; what waited in memory is lost")
            elif file.path in self._failing:
                self.message(_written_again(file))

    def _for_each_sink(self, send: Callable[[Sink], None]) -> None:
        """Call `send` with every sink; an error of one does not keep the report from the others."""
        for sink in self._sinks:
            self._try_sink(sink, send)

    def _try_sink(self, sink: Sink, send: Callable[[Sink], None]) -> None:
        """Call `send`; print each kind of error of a sink once, on stderr, which is no sink."""
        try:
            send(sink)
        except Exception as error:
            kind = (type(sink), type(error))
            if kind not in self._raised:
                print_error(f"{type(sink).__name__} lost a report ({type(error).__name__}: {one_line(error)})")
            self._raised.add(kind)

    def _log_failing_files(self) -> None:
        """Log once when a file begins to fail, once when it is written again.

        Logging writes to files: what comes of that is logged next time.
        """
        for file in [file for file in self._files if bool(file.trouble) != (file.path in self._failing)]:
            self._failing ^= {file.path}
            if file.trouble:
                self.message(f"cannot write {file.trouble}; what is missing waits in memory, and the run goes on")
            else:
                self.message(_written_again(file))


def _written_again(file: GrowingFile) -> str:
    return f"{file.path} is written again, and what waited for it"


@contextmanager
def open_reporter(
    run_dir: Path, total_steps: int, first_step: int, is_main: bool, logs: Sequence[GrowingFile] = ()
) -> Iterator[Reporter]:
    """Yield the Reporter of a rank; at the end write what files can take, and remove the bar."""
    sinks: list[Sink] = []
    if is_main:
        sinks = [TensorBoard(run_dir), LogFiles(run_dir, total_steps), Terminal(total_steps, first_step)]
    reporter = Reporter(sinks, logs)
    try:
        yield reporter
    finally:
        reporter.close()


@dataclass(frozen=True)
class AlarmRule:
    """The range of one scalar of a report, `figure`, and what it means to leave it."""

    name: str
    figure: str
    low: float
    high: float
    meaning: str

    def is_outside(self, value: float) -> bool:
        """Whether the value raises the alarm."""
        return value < self.low or value > self.high

    def is_well_inside(self, value: float) -> bool:
        """Whether the value ends the alarm."""
        return self.low * (1 + _MARGIN) <= value <= self.high * (1 - _MARGIN)


def alarm_rules(config: RunConfig) -> list[AlarmRule]:
    """Return the rules of this kind of run; a report without a scalar raises no alarm over it."""
    if not isinstance(config, Config):
        return []
    limits, uniform = config.system.checks.alarms, math.log(config.model.prototypes.num)
    sure, unsure = (share * uniform for share in limits.teacher_entropy)
    flat, wild = limits.latent_std
    return [
        AlarmRule(
            "teacher_entropy", "health/teacher_entropy", sure, unsure, "the teacher's targets are one-hot or uniform"
        ),
        AlarmRule("prototype_share", "health/prototype_share", 0.0, limits.prototype_share, "the prototypes collapse"),
        AlarmRule("latent_std_min", "health/latent_std_min", flat, math.inf, "a latent channel is constant"),
        AlarmRule("latent_std_max", "health/latent_std_max", 0.0, wild, "a latent channel grows without bound"),
    ]


class ReportAlarms:
    """Check reports against rules; remember which alarms are on. `log` takes a line."""

    def __init__(self, rules: list[AlarmRule], log: Callable[[str], None]) -> None:
        self._rules, self._log, self._on = rules, log, set[str]()

    def read(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return `health/alarm/NAME`, 1 or 0, for the scalars of this report; log what changed."""
        found = {}
        for rule in self._rules:
            if rule.figure in values:
                self._update(rule, step, values[rule.figure])
                found[f"health/alarm/{rule.name}"] = float(rule.name in self._on)
        return found

    def _update(self, rule: AlarmRule, step: int, value: float) -> None:
        if rule.name not in self._on and rule.is_outside(value):
            self._on.add(rule.name)
            self._log(
                f"alarm at step {step}: {rule.figure} is {value:.4g}, not between {rule.low:.4g} and {rule.high:.4g}: "
                f"{rule.meaning}"
            )
        elif rule.name in self._on and rule.is_well_inside(value):
            self._on.remove(rule.name)
            self._log(f"alarm over at step {step}: {rule.figure} is {value:.4g}")
