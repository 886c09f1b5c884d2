"""Train: from the first step, or from a checkpoint, to the weights; the same loop for every task (engine/tasks/).

    runs/NAME/  config.yaml  ds_config.json  choices.json  machine.json  log.txt  log.jsonl  tensorboard/  checkpoints/
                pictures/  bad_samples.jsonl  corpus.json  lost_shards.jsonl  weights.safetensors
                lock (flock of the first rank while the run is on)
                profile/ (with profile.steps)
                out_of_memory/ (when it did)

The loop reads as the data's way: batch, step, meter. Every report_every steps comes the one moment in which the host
looks at the device: report, check for anomalies, collect garbage, checkpoint, stop. Where an anomaly asks for it, the
run goes back to its last checkpoint and on with other data (engine/resume.py).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs import Config, DecoderGan, RunConfig, to_yaml
from configs.generator import GeneratorConfig
from engine import consolidate, distributed
from engine.checkpoint import reading
from engine.checkpoint.contents import DataProgress
from engine.checkpoint.saver import Saver, SaveResult
from engine.distributed import error_of_first_rank, on_first_rank
from engine.exits import STOPPED
from engine.health.anomalies import AnomalyMonitor, RollbackRequested, TrainingFailed
from engine.health.replicas import check_replicas
from engine.out_of_memory import MemoryAdvisor
from engine.process_settings import manual_garbage_collection
from engine.reporting.images import png
from engine.reporting.instruments import Instruments, measuring
from engine.reporting.reporter import ReportAlarms, Reporter, alarm_rules, open_reporter
from engine.reporting.step_meter import StepMeter
from engine.resume import DataCursor, Rollbacks, SampleDigest, resume_newest
from engine.run_directory import checkpoint_directory, clear_stop_request, lock_run_directory, run_directory
from engine.tasks.decoder_gan import build_decoder_gan_task
from engine.tasks.generator import build_generator_task
from engine.tasks.pretrain import build_pretrain_task
from engine.tasks.task import TrainingTask
from engine.watchdog.client import RankStatus, watchdog
from model.losses.comm import Comm
from profiling.instruments.memory import process_peak_bytes


def train(
    config: RunConfig, ds_config: dict[str, Any], comm: Comm, resume: bool, allowed_changes: tuple[str, ...] = ()
) -> int:
    """Train to optim.steps, or to a stop signal; return the exit code. A collective.

    `allowed_changes` are science keys that may differ from the checkpoint's, or sections of them.
    """
    run_dir = run_directory(config)
    # At a restart a rank of the previous run, on another host, may not yet have noticed that it is cut off.
    with exclusive_run_directory(run_dir, config.system.watch.silent_seconds), watchdog(config, run_dir) as status:
        if not resume:  # again: a run that held the lock meanwhile may have saved checkpoints
            on_first_rank(lambda: reading.check_start(config, resume, allowed_changes))
        if distributed.is_first():
            clear_stop_request(run_dir)
        status.at("assembling")
        memory = MemoryAdvisor(config, ds_config, run_dir, comm.rank, comm.world_size, distributed.device())
        with memory.explained("assembling"):
            task = build_task(config, ds_config, comm, run_dir, resume)
        with closing(task.data):
            status.at("loading")
            cursor, messages = resume_newest(task, allowed_changes) if resume else (DataCursor(), [])
            anomalies = AnomalyMonitor(comm, task.setup.device, config.health, task.setup.guards)
            anomalies.listen(run_dir)
            with (
                open_reporter(run_dir, config.optim.steps, cursor.step, comm.rank == 0, task.data.logs) as reporter,
                manual_garbage_collection(),
            ):
                describe_run(reporter, run_dir, task, ds_config, messages)
                with (
                    measuring(task, run_dir, reporter) as instruments,
                    closing(Saver(checkpoint_directory(config), config)) as saver,
                ):
                    trainer = Trainer(
                        task=task,
                        anomalies=anomalies,
                        alarms=ReportAlarms(alarm_rules(config), reporter.message),
                        rollbacks=Rollbacks(config.health.most_rollbacks),
                        reporter=reporter,
                        instruments=instruments,
                        saver=saver,
                        status=status,
                        memory=memory,
                    )
                    return trainer.run(cursor)


def build_task(
    config: RunConfig, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool
) -> TrainingTask:
    """Build the task that `config` is of; a collective. With `is_resumed` the caller loads a checkpoint next."""
    if isinstance(config, GeneratorConfig):
        return build_generator_task(config, ds_config, comm)
    if isinstance(config, DecoderGan):
        return build_decoder_gan_task(config, ds_config, comm, run_dir, is_resumed)
    assert isinstance(config, Config), "there is no other kind"
    return build_pretrain_task(config, ds_config, comm, run_dir, is_resumed)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The training loop: steps, and what happens at a report and at the end."""

    task: TrainingTask
    anomalies: AnomalyMonitor
    alarms: ReportAlarms
    rollbacks: Rollbacks
    reporter: Reporter
    instruments: Instruments
    saver: Saver
    status: RankStatus
    memory: MemoryAdvisor

    def run(self, cursor: DataCursor) -> int:
        """Train from `cursor` to optim.steps, over roll-backs; return the exit code."""
        outcome: DataCursor | int = cursor
        while isinstance(outcome, DataCursor):
            outcome = self._train_or_roll_back(outcome)
        return outcome

    def _train_or_roll_back(self, begin: DataCursor) -> DataCursor | int:
        """Train to the end and return the exit code; or roll back and return the cursor to go on from."""
        try:
            return self._train_steps(begin)
        except RollbackRequested as request:
            return self._roll_back(begin, request)
        except TrainingFailed as error:
            self.reporter.message(f"stopped: {error}")
            raise

    def _train_steps(self, begin: DataCursor) -> int:
        """Train to the end, or to a stop request; return the exit code. Raises RollbackRequested, TrainingFailed."""
        task, setup, config = self.task, self.task.setup, self.task.setup.config
        total, report_every = config.optim.steps, config.system.report_every
        self.status.step = begin.step
        self.status.follow_phases(setup.phases)
        meter = StepMeter(setup.comm, total, config.samples_per_step, self.instruments.utilisation)
        window, phases = self.instruments.window, self.instruments.phases
        batches = task.data.batches(begin.step, begin.skipped_steps, begin.offset)
        samples = SampleDigest(begin.samples_digest)
        for step in range(begin.step, total):
            window.before(step)
            with phases("data"):
                batch = next(batches)
            with self.memory.explained(f"in step {step}"):
                result = task.step(batch)
            window.after(step)
            done = self.status.step = step + 1
            meter.add(result)
            samples.add(task.data.sample_hash(batch))
            self.anomalies.watch(result.losses["total"])
            if done % report_every == 0 or done == total:
                with phases("report"):
                    is_stopping = self._report(done, replace(begin, samples_digest=samples.read()), meter)
                if is_stopping:
                    self.reporter.message(f"asked to stop: {done} of {total} steps are done; go on with --resume")
                    return STOPPED
        self.reporter.message(f"peak memory of this rank: {process_peak_bytes() / 2**30:.2f} GiB")
        self._write_weights()
        return 0

    def _report(self, done: int, cursor: DataCursor, meter: StepMeter) -> bool:
        """Report, act on anomalies, save a checkpoint and images when due; return whether to stop early."""
        task, config = self.task, self.task.setup.config
        system = config.system
        measured = self.instruments.read(meter.num_steps)
        counts = self.anomalies.read(done)
        gc.collect()
        values = meter.read(done, task.data.wait_seconds()) | measured
        values |= task.data.metrics() | task.metrics() | counts.values()
        values |= {"health/steps_of_data_left_out": float(cursor.skipped_steps)}
        values |= self._log_saves(self.saver.results())
        self.reporter.scalars(done, values | self.alarms.read(done, values))
        if counts.skipped:
            self.reporter.message(f"{counts}: {counts.skipped} optimizer steps were left out")
        self.anomalies.act(counts)
        if is_due(done, system.checks.replicas_every, system.report_every):
            check_replicas(task.train_state(), task.setup.comm, done)
        is_stopping, is_last = self.anomalies.should_stop(), done == config.optim.steps
        is_leaving = is_stopping or is_last
        if is_leaving or is_due(done, system.checkpoint.every, system.report_every):
            self._save(done, cursor)
        if is_leaving:
            self._log_saves(self.saver.finish())
        if distributed.is_first() and (is_leaving or is_due(done, system.images_every, system.report_every)):
            self.reporter.attempt(f"draw the images of step {done}", lambda: self._show_images(done))
        return is_stopping and not is_last

    def _save(self, done: int, cursor: DataCursor) -> None:
        """Start to save a checkpoint of `done` finished steps."""
        position = cursor.position(done, self.task.setup.config)
        facts = self.task.data.order_facts(position)
        progress = DataProgress(cursor.skipped_steps, cursor.samples_digest, facts, position)
        self.saver.save(done, self.task.train_state(), progress)

    def _log_saves(self, results: list[SaveResult]) -> dict[str, float]:
        """Log what became of saves; return the last one's scalars."""
        for result in results:
            self.reporter.message(result.message)
        return dict(results[-1].scalars) if results else {}

    def _show_images(self, done: int) -> None:
        """Write the images of the first rank's last step as files and to TensorBoard. No collective."""
        directory = run_directory(self.task.setup.config)
        for name, image in self.task.images().items():
            self.reporter.image(done, name, image)
            self.reporter.write_file(directory / "pictures" / f"{name}-{done:08d}.png", png(image))

    def _roll_back(self, begin: DataCursor, request: RollbackRequested) -> DataCursor:
        """Restore the last checkpoint; return the cursor behind the data that led to the anomaly."""
        self.status.at("rolling back")
        self._log_saves(self.saver.settle())
        cursor = self.rollbacks.go_back(self.task, begin, request, self.reporter.message)
        num_skipped = cursor.skipped_steps - begin.skipped_steps
        self.reporter.message(f"{request}: back to step {cursor.step}; the data of {num_skipped} steps is left out")
        return cursor

    def _write_weights(self) -> None:
        """Write weights.safetensors from the last checkpoint. Raises TrainingFailed, on all ranks, where it cannot."""
        self.status.at("consolidating" if distributed.is_first() else "barrier")  # where the others wait for it
        config = self.task.setup.config
        root, out = checkpoint_directory(config), run_directory(config) / "weights.safetensors"
        if problem := error_of_first_rank(
            lambda: consolidate.write_weights_file(reading.latest_readable(root), out, config)
        ):
            raise TrainingFailed(
                "weights", f"{problem}; the checkpoint is complete: remove the cause, then continue with --resume"
            )


def describe_run(
    reporter: Reporter, run_dir: Path, task: TrainingTask, ds_config: dict[str, Any], messages: list[str]
) -> None:
    """Write the config and all choices as files and log lines; log `messages` of a resume."""
    reporter.write_file(run_dir / "config.yaml", to_yaml(task.setup.config))
    reporter.write_file(run_dir / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    reporter.write_file(run_dir / "choices.json", json.dumps(task.setup.choices, indent=2) + "\n")
    for message in messages:
        reporter.message(message)
    reporter.attempt("describe the model", lambda: reporter.message(task.describe()))
    for name, choice in task.setup.choices.items():
        reporter.message(f"{name}: {choice}")


def is_due(done: int, every: int, report_every: int) -> bool:
    """Whether a multiple of `every` fell into the reporting window that ends at `done`."""
    return every > 0 and done // every > (done - report_every) // every


@contextmanager
def exclusive_run_directory(run_dir: Path, wait: float) -> Iterator[None]:
    """Keep other runs out of `run_dir`: the first rank holds a file lock in it. A collective.

    Raises UserError, on every rank, where another run still holds it after `wait` seconds. On a file system without
    locks it prints a warning and goes on.
    """
    with ExitStack() as stack:
        on_first_rank(lambda: lock_run_directory(stack, run_dir, wait))
        yield
