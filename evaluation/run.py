"""python -m evaluation.run RUN_OR_WEIGHTS --tasks zero_shot,linear_probe,knn,reconstruction

Looks at every held-out picture once, whatever the tasks, and at the training pictures once for those that learn; writes
evaluation.json, prints a table, and draws under pictures/. Under a launcher the ranks share the pictures:

    torchrun --nproc-per-node 8 -m evaluation.run runs/vtp_l --tasks linear_probe,knn
    deepspeed --module evaluation.run runs/vtp_l --tasks reconstruction --fid pt_inception-2015-12-05-6726825d.pth

The figures are those of one rank, to rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from configs import UserError
from configs.command_line import CommandParser
from engine import world
from engine.agreement import with_one_answer
from evaluation import results
from evaluation.command import check_counts, made, run_command
from evaluation.outcome import Outcome
from evaluation.source import open_source
from evaluation.tasks import TASKS, Options, Setup, check_tasks

READERS = {  # options that some tasks alone read
    "train_data": ("linear_probe", "knn"),
    "classes": ("zero_shot", "linear_probe", "knn"),  # probes look up class names in it
    "tokenizer": ("zero_shot",),
    "fid": ("reconstruction",),
    "lpips": ("reconstruction",),
}
DEFAULT_TASKS = ("zero_shot", "reconstruction")  # they need nothing but a held-out corpus


def evaluate(
    path: str | Path,
    options: Options,
    *,
    crop: int | None = None,
    caption_tokenizer: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The results by task, as they are written to `out`/evaluation.json (by default into the run, or beside the file).

    A collective. Raises UserError, on every rank, for what cannot be opened, for corpora that do not fit the tasks, and
    for figures that are no numbers.
    """
    options_tasks = check_tasks(options.tasks)
    device = world.device()

    def prepare() -> Setup:
        source = open_source(path, device, crop, caption_tokenizer)
        return Setup(source, options, device, made(out or source.folder))

    setup = with_one_answer(prepare)
    tasks = with_one_answer(lambda: {name: TASKS[name](setup) for name in options_tasks})

    def look() -> None:
        for batch in setup.batches(setup.held_out, "evaluating"):
            for task in tasks.values():
                task.add(batch)

    with_one_answer(look)
    outcomes: dict[str, Outcome] = {name: task.result() for name, task in tasks.items()}
    bad = sum(world.gather_objects(setup.held_out.bad), Counter())
    source, origin = setup.source, setup.source.tokenizer.origin
    about = {
        "source": source.name, "weights": source.digest(), "steps": origin and origin.steps,
        "latents": source.latent_digest(), "held_out": list(setup.data), "crop": source.crop, "bad_samples": dict(bad),
    }  # fmt: skip
    found = with_one_answer(lambda: results.as_json(outcomes, about))
    if world.is_first():
        results.write(setup.folder, found, outcomes)
    return found


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    given = _parser().parse_args(arguments)

    def work() -> None:
        found = evaluate(
            given.source, _options(given), crop=given.crop, caption_tokenizer=given.tokenizer, out=given.out
        )
        if world.is_first():
            results.show(found)

    return run_command(work)


def _options(given: argparse.Namespace) -> Options:
    check_counts(given, "batch_size", "limit", "crop")
    tasks = check_tasks(given.tasks.split(","))
    for name, readers in READERS.items():
        if getattr(given, name) and not set(readers) & set(tasks):
            raise UserError(
                f"--{name.replace('_', '-')} is read by {' and '.join(readers)}, but --tasks is {','.join(tasks)}: add "
                "a task that reads it, or leave it out"
            )
    return Options(
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
    parser = CommandParser(prog="python -m evaluation.run", description="What a trained tokenizer is worth.")
    add = parser.add_argument
    add("source", help="a run directory, a directory in the public layout, a weights file, or hf://OWNER/NAME")
    add(
        "--tasks",
        default=",".join(DEFAULT_TASKS),
        help=f"comma-separated, of {', '.join(TASKS)} (default: %(default)s)",
    )
    add("--data", nargs="+", default=(), metavar="SHARDS", help="labelled held-out shards (default: data.held_out)")
    add("--train-data", nargs="+", default=(), metavar="SHARDS", help="for probe and knn (default: data.train)")
    add("--limit", type=int, help="look at this many samples of each, evenly spaced")
    add("--batch-size", type=int, default=128, help="pictures a rank looks at together (%(default)s)")
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
