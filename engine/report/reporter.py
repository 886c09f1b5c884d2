"""What a run tells, and to whom: reports and sentences to every sink (engine/report/sinks.py), files beside them.

Only the main rank writes; the others get a Reporter without sinks. A report is a step number and a flat dict of floats,
named with slashes as TensorBoard groups them ("loss/clip", "speed/samples_per_second").

    with open_reporter(Path("runs/demo"), total_steps=300, first_step=0, is_main=True) as reporter:
        reporter.scalars(10, {"loss/total": 7.1, "speed/samples_per_second": 55.0})

No report ends a run: an error of a sink, or in `attempt`, is one log line. A file that cannot be written (a full disk)
is named once, with the reason, and once more when it is written again, waiting lines first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from configs.load import one_line
from data.durable_files import write_atomic
from engine.complaint import complain
from engine.report.sinks import GrowingFile, Log, Sink, TensorBoard, Terminal


class Reporter:
    """Hands each report to every sink. Of the files that others write to, `logs`, it tells as of its own."""

    def __init__(self, sinks: Sequence[Sink], logs: Sequence[GrowingFile] = ()) -> None:
        self._sinks, self._logs = sinks, logs
        self._files = [*logs, *(file for sink in sinks for file in sink.files)]
        self._failing: set[Path] = set()
        self._raised: set[tuple[type[Sink], type[Exception]]] = set()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One report; `step` counts finished steps."""
        for log in self._logs:
            log.flush()
        self._for_each_sink(lambda sink: sink.scalars(step, values))
        self._tell_of_files()

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """A (3, H, W) picture in [0, 1]."""
        self._for_each_sink(lambda sink: sink.picture(step, name, picture))

    def say(self, text: str) -> None:
        """A sentence for the log and the terminal."""
        self._for_each_sink(lambda sink: sink.say(text))

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Run `work`, which the run can do without; log an error as one line, "could not `what`: ...".

        `work` must not contain a collective: after an error the other ranks would wait in it.
        """
        try:
            work()
        except Exception as error:
            self.say(f"could not {what}: {type(error).__name__}: {one_line(error)}")

    def keep(self, path: Path, content: str | bytes) -> None:
        """Writes a file that the run can do without, on the main rank; where it cannot, it says so."""
        if not self._sinks:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, is_synced=False)
        except OSError as error:
            self.say(f"could not write {path}: {error.strerror or error}")
        except ValueError as error:  # text that UTF-8 cannot encode
            self.say(f"could not write {path}: {one_line(error)}")

    def close(self) -> None:
        """Tries once more to write what waits, and says what is lost."""
        for log in self._logs:
            log.flush()
        self._for_each_sink(lambda sink: sink.close())
        for file in self._files:
            if file.trouble:
                self.say(f"cannot write {file.trouble}; what waited in memory is lost")
            elif file.path in self._failing:
                self.say(_well(file))

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
                complain(f"{type(sink).__name__} lost a report ({type(error).__name__}: {one_line(error)})")
            self._raised.add(kind)

    def _tell_of_files(self) -> None:
        """Once when a file begins to fail, once when it is well. Telling writes to files: what comes of that is told
        next time."""
        for file in [file for file in self._files if bool(file.trouble) != (file.path in self._failing)]:
            self._failing ^= {file.path}
            if file.trouble:
                self.say(f"cannot write {file.trouble}; what is missing waits in memory, and the run goes on")
            else:
                self.say(_well(file))


def _well(file: GrowingFile) -> str:
    return f"{file.path} is written again, and what waited for it"


@contextmanager
def open_reporter(
    run_dir: Path, total_steps: int, first_step: int, is_main: bool, logs: Sequence[GrowingFile] = ()
) -> Iterator[Reporter]:
    """The Reporter of a rank; at the end its files have what they can take, and the bar is gone."""
    sinks: list[Sink] = []
    if is_main:
        sinks = [TensorBoard(run_dir), Log(run_dir, total_steps), Terminal(total_steps, first_step)]
    reporter = Reporter(sinks, logs)
    try:
        yield reporter
    finally:
        reporter.close()
