"""python -m evaluation.generate GENERATOR --tokenizer RUN_OR_WEIGHTS --guidance 1,4 --fid NETWORK... --data SHARDS

Evaluates a generator: gFID of its samples against the images of a corpus, for every guidance scale and feature
network. Samples with the averaged weights and decodes; writes generation.json and a plot of samples, and prints a
table. Under a launcher the ranks share the samples; the metrics are those of one rank, to rounding:

    torchrun --nproc-per-node 8 -m evaluation.generate runs/dit --tokenizer runs/vtp_l --num-samples 50000 \\
        --fid pt_inception-2015-12-05-6726825d.pth

The reference images are the tokenizer's training images unless --data names others: the field's gFID is against the
statistics of ImageNet's training set, whatever the tokenizer's rFID was measured on.

Each row of the results holds what its gFID depends on: network, number of samples, sampler, steps, guidance; and how
often each part of the generator was evaluated for a batch. With guidance, one evaluation has twice the batch size.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import UserError
from configs.command_line import CommandParser
from data.held_out import HeldOutImages
from engine import distributed
from engine.distributed import raise_on_all_ranks
from evaluation.command import check_counts, create_output_folder, run_command, with_progress
from evaluation.fid import Fid, open_network
from evaluation.reconstruction import FID_NOT_COMPUTED
from evaluation.results import check_finite_metrics, format_value, write_json, write_plot
from evaluation.samples import PRECISION_DTYPES, SampleGrid, SamplingPipeline
from evaluation.zero_shot import ClassTable
from model.generator.sampling import Sampling, SamplingMethod


@dataclass(frozen=True)
class GenerationOptions:
    """Command-line options; `sampling` is used with each guidance scale of `guidance`."""

    sampling: Sampling = field(default_factory=Sampling)
    guidance: tuple[float, ...] = (1.0,)
    num_samples: int = 10_000
    seed: int = 0
    batch_size: int = 64
    precision: str = "float32"  # of the generator's forward pass
    fid: tuple[Path, ...] = ()
    data: tuple[str, ...] = ()
    limit: int | None = None  # of the reference images
    classes: Path | None = None


class GeneratorEvaluation:
    """gFID of a generator: one pass over the reference images, one over the samples for every guidance scale."""

    def __init__(self, pipeline: SamplingPipeline, options: GenerationOptions) -> None:
        self.pipeline, self.options = pipeline, options
        source, config = pipeline.source, pipeline.source.config
        self.data = options.data or (config.data.train if config else ())
        self.fids = [Fid(open_network(path), pipeline.device) for path in options.fid]
        self.reference: HeldOutImages | None = None
        if self.fids:
            if not self.data:
                raise UserError("FID needs reference images: there is no run to name training shards; give --data")
            self.reference = source.open_images(self.data, "--data" if options.data else "data.train", options.limit)
        self._has_reference_features = False
        self.names = self._class_names()
        self.grid = SampleGrid(pipeline.generator.num_classes, options.num_samples)

    def evaluate(self, guidance: float) -> list[dict[str, Any]]:
        """Return a row of results for each network at one guidance scale. A collective.

        Samples first, so that errors of the sampler show before the pass over the reference images.
        """
        options, sampling = self.options, replace(self.options.sampling, guidance=guidance)
        raise_on_all_ranks(lambda: self._sample(sampling))
        if not self._has_reference_features:
            raise_on_all_ranks(self._add_reference)
            self._has_reference_features = True
        row = asdict(self.pipeline.generator.module.resolve_sampling(sampling)) | {
            "samples": options.num_samples,
            "precision": options.precision,
            "evaluations": self._evaluations_per_batch(),
        }
        if not self.fids:
            return [row | {"network": FID_NOT_COMPUTED, "gfid": None}]
        return [row | {"network": fid.name, "gfid": fid.result()} for fid in self.fids]

    def bad_samples(self) -> Counter[str]:
        """Count reference images that could not be decoded, by reason. A collective."""
        return sum(distributed.gather_objects(self.reference.bad if self.reference else Counter()), Counter())

    def _sample(self, sampling: Sampling) -> None:
        """Add this rank's part of the samples to FID and grid, in place of those of the previous guidance scale."""
        options = self.options
        numbers = np.arange(distributed.rank(), options.num_samples, distributed.world_size(), dtype=np.int64)
        self.pipeline.calls.clear()
        for fid in self.fids:
            fid.reset_fake()
        batches = self.pipeline.samples(numbers, sampling, options.seed, options.batch_size, options.precision)
        title = f"guidance {sampling.guidance:g}"
        for batch in with_progress(batches, title, -(-len(numbers) // options.batch_size)):
            self.grid.add(title, batch)
            for fid in self.fids:
                fid.add_fake(batch.images)

    def _add_reference(self) -> None:
        """Add this rank's part of the reference images to FID."""
        if self.reference is not None:
            total = -(-len(self.reference) // self.options.batch_size)
            for batch in with_progress(self.reference.batches(self.options.batch_size), "reference images", total):
                for fid in self.fids:
                    fid.add_real(batch.images.to(self.pipeline.device).float() / 255)
            self.reference.close()

    def _evaluations_per_batch(self) -> dict[str, float]:
        """Return how often a batch evaluated each part of the generator, on average. A collective."""
        calls = sum(distributed.gather_objects(self.pipeline.calls), Counter())
        return {name: count / calls["batches"] for name, count in calls.items() if name != "batches"}

    def _class_names(self) -> tuple[str, ...] | None:
        """Read the names of --classes, or of a large enough classes.json beside the reference or held-out shards."""
        given, num_classes = self.options.classes, self.pipeline.generator.num_classes
        for path in [given] if given else self._class_tables():
            names = ClassTable.read(path).names
            if len(names) >= num_classes:
                return names
            if given:
                raise UserError(
                    f"--classes {path} names {len(names)} classes, the generator has {num_classes}: give the table of "
                    "its corpus"
                )
        return None

    def _class_tables(self) -> list[Path]:
        config = self.pipeline.source.config
        shards = [Path(names[0]) for names in (self.data, config.data.held_out if config else ()) if names]
        beside = [(path if path.is_dir() else path.parent) / "classes.json" for path in shards]
        return [path for path in beside if path.is_file()]


def generate(generator: Path, tokenizer: str | Path, out: Path | None, options: GenerationOptions) -> dict[str, Any]:
    """Evaluate a generator and write `out`/generation.json (by default beside it); return its content. A collective.

    Raises UserError, on every rank, for what cannot be opened or does not belong together, and for a distance that is
    not finite.
    """
    device = distributed.device()
    folder = out or (generator if generator.is_dir() else generator.parent)
    evaluator = raise_on_all_ranks(
        lambda: GeneratorEvaluation(SamplingPipeline.open(generator, tokenizer, device), options)
    )
    raise_on_all_ranks(lambda: create_output_folder(folder / "pictures"))
    rows: list[dict[str, Any]] = []
    for guidance in options.guidance:
        rows += raise_on_all_ranks(partial(_check_finite_rows, evaluator.evaluate(guidance)))
    evaluator.grid.gather()
    content = {
        "generator": str(generator), "generator_weights": evaluator.pipeline.weights,
        "tokenizer": str(tokenizer), "tokenizer_weights": evaluator.pipeline.source.digest(),
        "seed": options.seed, "image_size": evaluator.pipeline.source.crop,
        "reference": list(evaluator.data) if options.fid else [], "reference_limit": options.limit,
        "results": rows, "bad_samples": dict(evaluator.bad_samples()),
    }  # fmt: skip

    def write() -> None:
        write_json(folder / "generation.json", content)
        write_plot(folder / "pictures" / "samples.png", partial(evaluator.grid.draw, evaluator.names))

    raise_on_all_ranks(lambda: write() if distributed.is_first() else None)
    return content


def _check_finite_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `rows`; raise UserError, before the next guidance scale, if a gFID is not finite."""
    for row in rows:
        check_finite_metrics({"gfid": row["gfid"]}, f"guidance {row['guidance']:g}, network {row['network']}")
    return rows


def show_generation(content: dict[str, Any], console: Console | None = None) -> None:
    """Print a table with one line for every guidance scale and network."""
    table = Table(
        "guidance", "sampler", "steps", "evaluations", "samples", "network", "gFID", title="evaluation of the generator"
    )
    for row in content["results"]:
        evaluations = ", ".join(f"{name} {format_value(float(count))}" for name, count in row["evaluations"].items())
        steps = "its own" if row["steps"] is None else str(row["steps"])
        distance = "-" if row["gfid"] is None else format_value(row["gfid"])
        table.add_row(
            f"{row['guidance']:g}",
            row["method"],
            steps,
            evaluations,
            str(row["samples"]),
            escape(row["network"]),
            distance,
        )
    (console or Console()).print(table)
    for reason, count in content["bad_samples"].items():
        (console or Console()).print(f"reference images left out: {count} {reason}")


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    given = _parser().parse_args(arguments)

    def work() -> None:
        content = generate(given.generator, given.tokenizer, given.out, _options(given))
        if distributed.is_first():
            show_generation(content)

    return run_command(work)


def _options(given: argparse.Namespace) -> GenerationOptions:
    check_counts(given, "num_samples", "batch_size", "limit")
    if not 0 <= given.seed < 2**64:
        raise UserError(f"--seed {given.seed}: give a number from 0 to 2^64 - 1")
    if given.limit is not None and not given.fid:
        raise UserError(f"--limit {given.limit} without --fid: no images are compared with; leave it out")
    sampling = Sampling(
        method=given.sampler,
        steps=given.steps,
        guidance_interval=_parse_numbers(given.guidance_interval, "--guidance-interval", 2),
        timestep_shift=given.shift,
        temperature=given.temperature,
        iterations=given.iterations,
    )
    guidance = _parse_numbers(given.guidance, "--guidance")
    for scale in guidance:
        replace(sampling, guidance=scale)  # raises for a wrong value before anything is opened
    return GenerationOptions(
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


def _parse_numbers(text: str, key: str, count: int | None = None) -> Any:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (count is not None and len(numbers) != count):
        raise UserError(f"{key} {text}: give {count or 'some'} numbers with commas between them, such as 1,4")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m evaluation.generate", description="Evaluate a generator.")
    add = parser.add_argument
    add("generator", type=Path, help="the run directory of a generator, or a weights file of one")
    add("--tokenizer", required=True, help="of its latents: a run, public directory, weights file or hf://OWNER/NAME")
    add("--num-samples", type=int, default=10_000, help="samples for each guidance scale (%(default)s)")
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
    add("--batch-size", type=int, default=64, help="samples a rank draws together (%(default)s)")
    add(
        "--precision", choices=PRECISION_DTYPES, default="float32", help="of the generator's forward pass (%(default)s)"
    )
    add("--fid", type=Path, nargs="+", default=(), metavar="NETWORK", help="feature networks for gFID")
    add(
        "--data", nargs="+", default=(), metavar="SHARDS", help="reference images (default: the tokenizer's data.train)"
    )
    add("--limit", type=int, help="use this many reference images, evenly spaced")
    add("--classes", type=Path, help="class table (default: classes.json beside the shards or data.held_out, if there)")
    add("--out", type=Path, help="where results go (default: the generator's directory)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher's; LOCAL_RANK says the same
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
