"""python -m evaluation.run RUN_OR_WEIGHTS --tasks zero_shot,linear_probe,knn,reconstruction

Evaluates a trained tokenizer: one pass over the held-out images for all tasks, and one over the training images for
those that learn. Writes evaluation.json and plots under pictures/, and prints a table. Under a launcher the ranks
share the images; the metrics are those of one rank, to rounding:

    torchrun --nproc-per-node 8 -m evaluation.run runs/vtp_l --tasks linear_probe,knn
    deepspeed --module evaluation.run runs/vtp_l --tasks reconstruction --fid pt_inception-2015-12-05-6726825d.pth

A new task is a class with `add` and `result` (evaluation/results.py) and one line in TASKS.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from configs.command_line import CommandParser
from data.held_out import HeldOutImages
from engine import distributed
from engine.distributed import raise_on_all_ranks
from evaluation.command import check_counts, create_output_folder, run_command, with_progress
from evaluation.feature_bank import FeatureBank
from evaluation.fid import PerceptualNetwork, open_network, open_perceptual
from evaluation.probes import LinearProbe, NearestNeighbours, ProbeData
from evaluation.reconstruction import Reconstruction
from evaluation.results import Task, TaskResult, show_results, to_json, write_results
from evaluation.tokenizer_source import TokenizerOutputs, TokenizerSource, open_tokenizer
from evaluation.zero_shot import ClassTable, ZeroShot, class_embeddings
from model.weights import digest


@dataclass(frozen=True)
class EvaluationOptions:
    """Command-line options beside the tokenizer; empty or None: as in the run's config."""

    tasks: tuple[str, ...]
    data: tuple[str, ...] = ()
    train_data: tuple[str, ...] = ()
    classes: Path | None = None
    fid: tuple[Path, ...] = ()
    lpips: Path | None = None
    limit: int | None = None
    batch_size: int = 128


class EvaluationSetup:
    """Tokenizer, corpora and files that tasks are built from. What is missing is a UserError when first used."""

    def __init__(self, source: TokenizerSource, options: EvaluationOptions, device: torch.device, folder: Path) -> None:
        self.source, self.options, self.device, self.folder = source, options, device, folder
        self.data = options.data or (source.config.data.held_out if source.config else ())
        if not self.data:
            raise UserError(
                "nothing to evaluate on: data.held_out is empty, or there is no run to have one; name labelled shards "
                "with --data"
            )

    @cached_property
    def held_out(self) -> HeldOutImages:
        """The held-out images, opened once. Raises UserError for missing or empty shards."""
        classes = self._classes_file if self.options.classes or self._classes_file.is_file() else None
        return self._open_images(self.data, "--data" if self.options.data else "data.held_out", classes)

    @cached_property
    def class_table(self) -> ClassTable:
        """The table of --classes, or of classes.json beside the first shard."""
        return ClassTable.read(self._classes_file)

    @property
    def _classes_file(self) -> Path:
        shards = Path(self.data[0])
        return self.options.classes or (shards if shards.is_dir() else shards.parent) / "classes.json"

    @cached_property
    def probe_data(self) -> ProbeData:
        """Features that probes learn from and are tested on. Opens the training shards, so that errors show early."""
        train_data = self.options.train_data or (self.source.config.data.train if self.source.config else ())
        if not train_data:
            raise UserError("probes learn from training images: name labelled training shards with --train-data")
        key = "--train-data" if self.options.train_data else "data.train"
        # With the class table of the held-out images, so that class names get the same indices in both.
        training = self._open_images(train_data, key, self.held_out.classes.path)
        held_out_bank = FeatureBank(len(self.held_out), self.folder)
        return ProbeData(held_out_bank, lambda: self._extract_features(training), self.device)

    def batches(self, images: HeldOutImages, title: str) -> Iterator[TokenizerOutputs]:
        """Yield this rank's images as lazily computed tokenizer outputs, with a progress bar."""
        batch_size = self.options.batch_size
        with closing(images):
            for batch in with_progress(images.batches(batch_size), title, -(-len(images) // batch_size)):
                if LABELLED_TASKS & set(self.options.tasks):
                    images.classes.require_known()
                pixels, labels = batch.images.to(self.device).float() / 255, batch.labels.to(self.device)
                yield TokenizerOutputs(self.source.tokenizer, pixels, labels, batch.positions)

    def _extract_features(self, training: HeldOutImages) -> FeatureBank:
        bank = FeatureBank(len(training), self.folder)

        def fill() -> None:
            for batch in self.batches(training, "training features"):
                bank.add(batch)

        raise_on_all_ranks(fill)
        return bank

    def _open_images(self, patterns: Sequence[str], key: str, classes: Path | None) -> HeldOutImages:
        return self.source.open_images(patterns, key, self.options.limit, classes)


def _zero_shot(setup: EvaluationSetup) -> Task:
    table, source = setup.class_table, setup.source
    weights_KE = class_embeddings(source.tokenizer, source.caption_encoder(), table.prompts, setup.device)
    return ZeroShot(weights_KE, table, distributed.Ranks())


def _linear_probe(setup: EvaluationSetup) -> Task:
    return LinearProbe(setup.probe_data)


def _knn(setup: EvaluationSetup) -> Task:
    return NearestNeighbours(setup.probe_data)


def _reconstruction(setup: EvaluationSetup) -> Task:
    networks = [open_network(path) for path in setup.options.fid]
    return Reconstruction(networks, _perceptual(setup), setup.device)


def _perceptual(setup: EvaluationSetup) -> PerceptualNetwork | None:
    """Open the LPIPS weights of --lpips, else those that the run was trained with, if the file is there."""
    config = setup.source.config
    if setup.options.lpips is not None:
        return open_perceptual(setup.options.lpips, "--lpips")
    trained_with = config.objectives.rec.lpips_weights if config is not None else None
    if config is None or not trained_with or not Path(trained_with).is_file():
        return None
    if config.objectives.rec.lpips_sha256 not in (None, digest(Path(trained_with))):
        raise UserError(
            f"objectives.rec.lpips_weights={trained_with} is not the file the run was trained with (sha256 "
            f"{config.objectives.rec.lpips_sha256}): distances of two networks are not comparable; give the "
            "right file with --lpips"
        )
    return open_perceptual(trained_with, "objectives.rec.lpips_weights")


TASKS: dict[str, Callable[[EvaluationSetup], Task]] = {
    "zero_shot": _zero_shot,
    "linear_probe": _linear_probe,
    "knn": _knn,
    "reconstruction": _reconstruction,
}


LABELLED_TASKS = frozenset(["zero_shot", "linear_probe", "knn"])  # tasks that need labels


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Return the task names without repetition. Raises UserError for an unknown one."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: {name!r} is not one of {', '.join(TASKS)}")
    return tuple(dict.fromkeys(names))


TASKS_WITH_OPTION = {  # options that only some tasks read
    "train_data": ("linear_probe", "knn"),
    "classes": ("zero_shot", "linear_probe", "knn"),  # probes look up class names in it
    "tokenizer": ("zero_shot",),
    "fid": ("reconstruction",),
    "lpips": ("reconstruction",),
}
DEFAULT_TASKS = ("zero_shot", "reconstruction")  # they need nothing but a held-out corpus


def evaluate(
    path: str | Path,
    options: EvaluationOptions,
    *,
    crop: int | None = None,
    caption_tokenizer: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run the tasks and write `out`/evaluation.json (by default into the run, or beside the file); return its content.

    A collective. Raises UserError, on every rank, for what cannot be opened, for corpora that do not fit the tasks, and
    for metrics that are not finite.
    """
    task_names = check_tasks(options.tasks)
    device = distributed.device()

    def prepare() -> EvaluationSetup:
        source = open_tokenizer(path, device, crop, caption_tokenizer)
        return EvaluationSetup(source, options, device, create_output_folder(out or source.folder))

    setup = raise_on_all_ranks(prepare)
    tasks = raise_on_all_ranks(lambda: {name: TASKS[name](setup) for name in task_names})

    def run_pass() -> None:
        for batch in setup.batches(setup.held_out, "evaluating"):
            for task in tasks.values():
                task.add(batch)

    raise_on_all_ranks(run_pass)
    results: dict[str, TaskResult] = {name: task.result() for name, task in tasks.items()}
    bad = sum(distributed.gather_objects(setup.held_out.bad), Counter())
    source, origin = setup.source, setup.source.tokenizer.origin
    about = {
        "source": source.name, "weights": source.digest(), "steps": origin and origin.steps,
        "latents": source.latent_digest(), "held_out": list(setup.data), "crop": source.crop, "bad_samples": dict(bad),
    }  # fmt: skip
    content = raise_on_all_ranks(lambda: to_json(results, about))
    if distributed.is_first():
        write_results(setup.folder, content, results)
    return content


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    given = _parser().parse_args(arguments)

    def work() -> None:
        content = evaluate(
            given.source, _options(given), crop=given.crop, caption_tokenizer=given.tokenizer, out=given.out
        )
        if distributed.is_first():
            show_results(content)

    return run_command(work)


def _options(given: argparse.Namespace) -> EvaluationOptions:
    check_counts(given, "batch_size", "limit", "crop")
    tasks = check_tasks(given.tasks.split(","))
    for name, readers in TASKS_WITH_OPTION.items():
        if getattr(given, name) and not set(readers) & set(tasks):
            raise UserError(
                f"--{name.replace('_', '-')} is read by {' and '.join(readers)}, but --tasks is {','.join(tasks)}: add "
                "a task that reads it, or leave it out"
            )
    return EvaluationOptions(
        tasks=tasks,
        data=tuple(given.data),
        train_data=tuple(given.train_data),
        classes=given.classes,
        fid=tuple(given.fid),
        lpips=given.lpips,
        limit=given.limit,
        batch_size=given.batch_size,
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m evaluation.run", description="Evaluate a trained tokenizer.")
    add = parser.add_argument
    add("source", help="a run directory, a directory in the public layout, a weights file, or hf://OWNER/NAME")
    add(
        "--tasks",
        default=",".join(DEFAULT_TASKS),
        help=f"comma-separated, of {', '.join(TASKS)} (default: %(default)s)",
    )
    add("--data", nargs="+", default=(), metavar="SHARDS", help="labelled held-out shards (default: data.held_out)")
    add("--train-data", nargs="+", default=(), metavar="SHARDS", help="for probe and knn (default: data.train)")
    add("--limit", type=int, help="use this many samples of each corpus, evenly spaced")
    add("--batch-size", type=int, default=128, help="images a rank processes together (%(default)s)")
    add("--crop", type=int, help="side of the centre crop in pixels (default: the run's; 256 without one)")
    add("--classes", type=Path, help="class table (default: classes.json beside the held-out shards)")
    add("--tokenizer", help="the captions' tokenizer.json or hub name (default: the run's)")
    add("--fid", type=Path, nargs="+", default=(), metavar="FILE", help="feature networks for rFID")
    add("--lpips", type=Path, help="LPIPS weights (default: the run's, if there)")
    add("--out", type=Path, help="where results go (default: the run directory, beside the file, or NAME)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher's; LOCAL_RANK says the same
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
