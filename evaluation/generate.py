"""python -m evaluation.generate GENERATOR --tokenizer RUN_OR_WEIGHTS --guidance 1,4 --fid NETWORK... --data SHARDS

What a generator is worth: the Fréchet distance between pictures that it makes and those of a corpus, for every guidance
scale and feature network. Samples the averaged weights, decodes, compares; writes generation.json and a picture of
samples, prints a table. Under a launcher the ranks share the samples, with the figures of one rank, to rounding:

    torchrun --nproc-per-node 8 -m evaluation.generate runs/dit --tokenizer runs/vtp_l --num-samples 50000 \\
        --fid pt_inception-2015-12-05-6726825d.pth

The other side of the comparison is the tokenizer's training pictures unless --data names others: the field's gFID is
against the statistics of ImageNet's training set, whatever the tokenizer's rFID was measured on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import UserError
from configs.command_line import CommandParser
from engine import world
from engine.agreement import with_one_answer
from evaluation.command import check_counts, made, run_command
from evaluation.generation import Generation, Options
from evaluation.results import check_numbers, draw_picture, words, write_figures
from evaluation.samples import PRECISIONS, Pair
from model.generator.sampling import Sampling, SamplingMethod


def generate(generator: Path, tokenizer: str | Path, out: Path | None, options: Options) -> dict[str, Any]:
    """The results, as they are written to `out`/generation.json (by default beside the generator). A collective.

    Raises UserError, on every rank, for what cannot be opened or does not belong together, and for a distance that is
    no number.
    """
    device = world.device()
    folder = out or (generator if generator.is_dir() else generator.parent)
    judged = with_one_answer(lambda: Generation(Pair.open(generator, tokenizer, device), options))
    with_one_answer(lambda: made(folder / "pictures"))
    rows: list[dict[str, Any]] = []
    for guidance in options.guidance:
        rows += with_one_answer(partial(_checked, judged.judge(guidance)))
    judged.grid.gather()
    found = {
        "generator": str(generator), "generator_weights": judged.pair.weights,
        "tokenizer": str(tokenizer), "tokenizer_weights": judged.pair.source.digest(),
        "seed": options.seed, "image_size": judged.pair.source.crop,
        "reference": list(judged.data) if options.fid else [], "reference_limit": options.limit,
        "results": rows, "bad_samples": dict(judged.bad_samples()),
    }  # fmt: skip

    def write() -> None:
        write_figures(folder / "generation.json", found)
        draw_picture(folder / "pictures" / "samples.png", partial(judged.grid.draw, judged.names))

    with_one_answer(lambda: write() if world.is_first() else None)
    return found


def _checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows`, whose figures are numbers. Raises UserError for one that is not, before the next guidance scale."""
    for row in rows:
        check_numbers({"gfid": row["gfid"]}, f"guidance {row['guidance']:g}, network {row['network']}")
    return rows


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints one line for every guidance scale and network."""
    table = Table(
        "guidance", "sampler", "steps", "evaluations", "samples", "network", "gFID", title="what it generates"
    )
    for row in found["results"]:
        asked = ", ".join(f"{name} {words(float(count))}" for name, count in row["evaluations"].items())
        steps = "its own" if row["steps"] is None else str(row["steps"])
        distance = "-" if row["gfid"] is None else words(row["gfid"])
        table.add_row(
            f"{row['guidance']:g}", row["method"], steps, asked, str(row["samples"]), escape(row["network"]), distance
        )
    (console or Console()).print(table)
    for reason, count in found["bad_samples"].items():
        (console or Console()).print(f"not compared with: {count} {reason}")


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    given = _parser().parse_args(arguments)

    def work() -> None:
        found = generate(given.generator, given.tokenizer, given.out, _options(given))
        if world.is_first():
            show(found)

    return run_command(work)


def _options(given: argparse.Namespace) -> Options:
    check_counts(given, "num_samples", "batch_size", "limit")
    if not 0 <= given.seed < 2**64:
        raise UserError(f"--seed {given.seed}: give a number from 0 to 2^64 - 1")
    if given.limit is not None and not given.fid:
        raise UserError(f"--limit {given.limit} without --fid: no pictures are compared with; leave it out")
    sampling = Sampling(
        method=given.sampler,
        steps=given.steps,
        guidance_interval=_numbers(given.guidance_interval, "--guidance-interval", 2),
        timestep_shift=given.shift,
        temperature=given.temperature,
        iterations=given.iterations,
    )
    guidance = _numbers(given.guidance, "--guidance")
    for scale in guidance:
        replace(sampling, guidance=scale)  # says what is wrong with it before anything is opened
    return Options(
        sampling=sampling,
        guidance=guidance,
        num_samples=given.num_samples,
        seed=given.seed,
        batch_size=given.batch_size,
        precision=given.precision,
        fid=tuple(given.fid),
        data=tuple(given.data),
        limit=given.limit,
        classes=given.classes,
    )


def _numbers(text: str, key: str, count: int | None = None) -> Any:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (count is not None and len(numbers) != count):
        raise UserError(f"{key} {text}: give {count or 'some'} numbers with commas between them, such as 1,4")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m evaluation.generate", description="What a generator is worth.")
    add = parser.add_argument
    add("generator", type=Path, help="the run directory of a generator, or a weights file of one")
    add("--tokenizer", required=True, help="of its latents: a run, public directory, weights file or hf://OWNER/NAME")
    add("--num-samples", type=int, default=10_000, help="pictures for each guidance scale (%(default)s)")
    add("--guidance", default="1", help="classifier-free guidance scales, comma-separated; 1 is none (%(default)s)")
    add("--guidance-interval", default="0,1", help="times between which there is guidance; 0 is noise (%(default)s)")
    add(
        "--sampler",
        choices=get_args(SamplingMethod),
        help="how latents are drawn (default: euler; ancestral where noise is predicted)",
    )
    add("--steps", type=int, help="of the sampler (default: the published number; dopri5 chooses its own)")
    add("--shift", type=float, default=1.0, help="of the times of euler and heun (%(default)s, none)")
    add("--temperature", type=float, default=1.0, help="of noise added on the way, by sde and ancestral (%(default)s)")
    add("--iterations", type=int, help="in which a masked generator draws all tokens (default: the published number)")
    add("--seed", type=int, default=0, help="of the samples' noise (%(default)s)")
    add("--batch-size", type=int, default=64, help="pictures a rank makes together (%(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help="of the generator's products (%(default)s)")
    add("--fid", type=Path, nargs="+", default=(), metavar="NETWORK", help="feature networks for gFID")
    add("--data", nargs="+", default=(), metavar="SHARDS", help="to compare with (default: the tokenizer's data.train)")
    add("--limit", type=int, help="compare with this many pictures, evenly spaced")
    add("--classes", type=Path, help="class table (default: classes.json beside the shards or data.held_out, if there)")
    add("--out", type=Path, help="where results go (default: the generator's directory)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher's; LOCAL_RANK says the same
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
