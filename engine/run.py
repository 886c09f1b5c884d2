"""A run from its first step, or from a checkpoint, to its weights, whatever it trains (engine/training.py).

    runs/NAME/  config.yaml  ds_config.json  choices.json  machine.json  log.txt  log.jsonl  tensorboard/  checkpoints/
                pictures/  bad_samples.jsonl  corpus.json  lost_shards.jsonl  weights.safetensors
                lock (flock of the first rank while the run is on)
                profile/ (with profile.steps)
                out_of_memory/ (when it did)

The loop reads as the data's way: batch, step, meter; and every report_every steps the one moment in which the host
looks at the device: report, guard, collect garbage, stop, checkpoint. Where the guard says so, the run goes back to its
last checkpoint and on with other data (engine/health/rollback.py).
"""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs import RunConfig, UserError, to_yaml
from engine import archive, stop_file, world
from engine.agreement import on_first, trouble_of_first
from engine.checkpoint.contents import Consumed
from engine.checkpoint.saver import News, Saver
from engine.checkpoint.verified import newest_good
from engine.complaint import complain
from engine.exits import STOPPED
from engine.garbage import collected_by_hand
from engine.health import replicas
from engine.health.alarms import Alarms, rules
from engine.health.failure import TrainingFailed
from engine.health.guard import GoBack, Guard
from engine.health.rollback import Cursor, Rollbacks, batch_change_message, check_corpus, restored
from engine.lock import file_lock, lock_holder
from engine.out_of_memory import Memory
from engine.places import checkpoints, run_directory
from engine.report.instruments import Instruments, watching
from engine.report.meter import Meter
from engine.report.pictures import png
from engine.report.reporter import Reporter, open_reporter
from engine.samples import SampleLog
from engine.training import Training
from engine.trainings import kinds
from engine.watch.place import Place
from engine.watch.watch import watched
from model.losses.comm import Comm
from profiling.instruments.memory import process_peak_bytes

LOCK_FILE = "lock"  # in the run's directory
NFS_LEASE_SECONDS = 90.0  # how long an NFS server keeps the lock of a host that is gone


def train(
    config: RunConfig, ds_config: dict[str, Any], comm: Comm, resume: bool, allowed_changes: tuple[str, ...] = ()
) -> int:
    """Trains to optim.steps, or to a stop signal; gives the exit code. `allowed_changes` are science keys that may
    differ from the checkpoint's, or sections of them. A collective."""
    run_dir = run_directory(config)
    # At a restart a rank of the previous run, on another host, may not yet have noticed that it is cut off.
    with exclusive_run_directory(run_dir, config.system.watch.silent_seconds), watched(config, run_dir) as place:
        if not resume:  # again: a run that held the lock meanwhile may have saved checkpoints
            on_first(lambda: archive.check_start(config, resume, allowed_changes))
        if world.is_first():
            stop_file.forget(run_dir)
        place.at("assembling")
        memory = Memory(config, ds_config, run_dir, comm.rank, comm.world_size, world.device())
        with memory.explained("assembling"):
            training = kinds.assemble(config, ds_config, comm, run_dir, resume)
        with closing(training):
            place.at("loading")
            begin, passed_over = _resumed(training, allowed_changes) if resume else (Cursor(), [])
            guard = Guard(comm, training.device, config.health, training.judges)
            guard.listen(run_dir)
            told = open_reporter(run_dir, config.optim.steps, begin.step, world.is_first(), training.logs)
            with told as reporter, collected_by_hand():
                _describe(reporter, run_dir, training, ds_config, passed_over)
                rollbacks, alarms = Rollbacks(config.health.most_rollbacks), Alarms(rules(config), reporter.say)
                with (
                    watching(training, run_dir, reporter) as instruments,
                    closing(Saver(checkpoints(config), config)) as saver,
                ):
                    parts = (training, guard, reporter, instruments, memory, saver, place, rollbacks, alarms, run_dir)
                    return Loop(*parts).go(begin)


@dataclass(frozen=True)
class Loop:
    """The loop and its occasions: every step, every report, the end."""

    training: Training
    guard: Guard
    reporter: Reporter
    instruments: Instruments
    memory: Memory
    saver: Saver
    place: Place
    rollbacks: Rollbacks
    alarms: Alarms
    directory: Path

    def go(self, begin: Cursor) -> int:
        """Steps from `begin` to optim.steps, over roll-backs; gives the exit code."""
        outcome: Cursor | int = begin
        while isinstance(outcome, Cursor):
            outcome = self._stretch(outcome)
        return outcome

    def _stretch(self, begin: Cursor) -> Cursor | int:
        """Steps to the end, or to where the run goes on after a roll-back."""
        try:
            return self._steps(begin)
        except GoBack as trouble:
            self.place.at("rolling back")
            self._tell(self.saver.settle())
            cursor = self.rollbacks.go_back(self.training, begin, trouble, self.reporter.say)
            left_out = cursor.skipped_steps - begin.skipped_steps
            self.reporter.say(f"{trouble}: back to step {cursor.step}; the data of {left_out} steps is left out")
            return cursor
        except TrainingFailed as error:
            self.reporter.say(f"stopped: {error}")
            raise

    def _steps(self, begin: Cursor) -> int:
        config = self.training.config
        total, report_every = config.optim.steps, config.system.report_every
        self.place.step = begin.step
        self.place.follow(self.training.phases)
        meter = Meter(self.training.comm, total, config.samples_per_step, self.instruments.use)
        window, phases = self.instruments.window, self.instruments.phases
        batches = self.training.batches(begin.step, begin.skipped_steps, begin.offset)
        samples = SampleLog(begin.samples_digest)
        for step in range(begin.step, total):
            window.before(step)
            with phases("data"):
                batch = next(batches)
            with self.memory.explained(f"in step {step}"):
                record = self.training.step(batch)
            window.after(step)
            done = self.place.step = step + 1
            meter.add(record)
            samples.add(self.training.samples(batch))
            self.guard.watch(record.losses["total"])
            if done % report_every == 0 or done == total:
                with phases("report"):
                    is_stopping = self._report(done, replace(begin, samples_digest=samples.read()), meter)
                if is_stopping:
                    self.reporter.say(f"asked to stop: {done} of {total} steps are done; go on with --resume")
                    return STOPPED
        self.reporter.say(f"peak memory of this rank: {process_peak_bytes() / 2**30:.2f} GiB")
        self._write_weights()
        return 0

    def _write_weights(self) -> None:
        """What the run is for, from its last checkpoint. Raises TrainingFailed, on all ranks, where it cannot."""
        self.place.at("consolidating" if world.is_first() else "barrier")  # where the others wait for it
        root, out = checkpoints(self.training.config), self.directory / "weights.safetensors"
        if trouble := trouble_of_first(lambda: archive.consolidate(archive.find(root), out, self.training.config)):
            raise TrainingFailed(
                "weights", f"{trouble}; the checkpoint is complete: remove the cause, then continue with --resume"
            )

    def _report(self, done: int, cursor: Cursor, meter: Meter) -> bool:
        """Read the device's counters; save a checkpoint, then draw pictures when due; return whether to stop early."""
        training, config = self.training, self.training.config
        system = config.system
        beside = self.instruments.read(meter.num_steps)
        found = self.guard.read(done)
        gc.collect()
        values = meter.read(done, training.wait_seconds()) | beside | training.health() | found.values()
        values |= {"health/steps_of_data_left_out": float(cursor.skipped_steps)} | self._tell(self.saver.news())
        self.reporter.scalars(done, values | self.alarms.read(done, values))
        if found.skipped:
            self.reporter.say(f"{found}: {found.skipped} optimizer steps were left out")
        self.guard.act(found)
        if is_due(done, system.checks.replicas_every, system.report_every):
            replicas.check(training.kept(), training.comm, done)
        is_stopping, is_last = self.guard.should_stop(), done == config.optim.steps
        is_leaving = is_stopping or is_last
        if is_leaving or is_due(done, system.checkpoint.every, system.report_every):
            position = cursor.position(done, config)
            consumed = Consumed(cursor.skipped_steps, cursor.samples_digest, training.corpus(position), position)
            self.saver.save(done, training.kept(), consumed)
        if is_leaving:
            self._tell(self.saver.finish())
        if world.is_first() and (is_leaving or is_due(done, system.images_every, system.report_every)):
            self.reporter.attempt(f"draw the pictures of step {done}", lambda: self._show(done))
        return is_stopping and not is_last

    def _tell(self, news: list[News]) -> dict[str, float]:
        """Says what became of checkpoints; the last one's scalars."""
        for each in news:
            self.reporter.say(each.words)
        return dict(news[-1].scalars) if news else {}

    def _show(self, done: int) -> None:
        """Write the pictures of the first rank's last step as files and to TensorBoard. No collective."""
        for name, picture in self.training.pictures().items():
            self.reporter.picture(done, name, picture)
            self.reporter.keep(self.directory / "pictures" / f"{name}-{done:08d}.png", png(picture))


@contextmanager
def exclusive_run_directory(run_dir: Path, wait: float) -> Iterator[None]:
    """Keep other runs out of `run_dir`: the first rank holds a file lock in it. A collective.

    Raises UserError, on every rank, where another run still holds it after `wait` seconds. On a file system without
    locks it prints a warning and goes on.
    """
    with ExitStack() as stack:
        on_first(lambda: _lock_run_directory(stack, run_dir, wait))
        yield


def _lock_run_directory(stack: ExitStack, run_dir: Path, wait: float) -> None:
    """Lock `run_dir` until `stack` closes. Raises UserError where another run still holds it after `wait` seconds."""
    path = run_dir / LOCK_FILE
    try:
        if stack.enter_context(file_lock(path)) is not None:
            return
        wait += 0.0 if f"host {socket.gethostname()} " in lock_holder(path) else NFS_LEASE_SECONDS
        complain(f"{run_dir} is in use by {lock_holder(path)}: waiting {wait:g} s for it to end")
        if stack.enter_context(file_lock(path, wait)) is not None:
            return
    except OSError as error:
        complain(
            f"warning: {path} cannot be locked ({error.strerror or error}): a second run in this directory would not "
            "be noticed; start none"
        )
        return
    raise UserError(
        f"{run_dir} is in use by {lock_holder(path)}: two runs would write over each other's checkpoints; let that one "
        f"end (`touch {run_dir}/stop` makes it save and stop), choose another name=..., or remove {path} if its host "
        "is gone for good"
    )


def is_due(done: int, every: int, report_every: int) -> bool:
    """Whether a multiple of `every` fell into the reporting window that ends at `done`."""
    return every > 0 and done // every > (done - report_every) // every


def _resumed(training: Training, allowed_changes: tuple[str, ...]) -> tuple[Cursor, list[str]]:
    """Restore the newest good checkpoint; return the cursor and log lines on skipped checkpoints and batch size."""
    messages: list[str] = []
    path = newest_good(checkpoints(training.config), messages.append)
    check_corpus(training, path, allowed_changes)
    if message := batch_change_message(path, training.config):
        messages.append(message)
    return restored(training, path), messages


def _describe(
    reporter: Reporter, run_dir: Path, training: Training, ds_config: dict[str, Any], passed_over: list[str]
) -> None:
    """What is trained and how, as files and in words, and which checkpoints were passed over."""
    reporter.keep(run_dir / "config.yaml", to_yaml(training.config))
    reporter.keep(run_dir / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    reporter.keep(run_dir / "choices.json", json.dumps(training.choices, indent=2) + "\n")
    for words in passed_over:
        reporter.say(words)
    reporter.attempt("describe the model", lambda: reporter.say(training.describe()))
    for name, choice in training.choices.items():
        reporter.say(f"{name}: {choice}")
