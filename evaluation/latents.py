"""python -m evaluation.latents RUN_OR_WEIGHTS --data SHARDS --out DIR: a corpus as latents, to train generators on.

Encodes every labelled picture, centre-cropped, and its mirror image, and writes them with the statistics of their
channels in LightningDiT's layout (data/latents/store.py). The store appears whole or not at all, and a second run of
the same command finds it there and does nothing. Under a launcher the ranks share the pictures, and the store reads
the same:

    torchrun --nproc-per-node 8 -m evaluation.latents runs/vtp_l --data imagenet/train --out latents --dtype bfloat16
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from configs.command_line import CommandParser
from data.durable_files import PARTIAL, is_published, staged_directory, write_manifest
from data.held_out import HeldOutImages, check_number_of_classes
from data.latents.channel_statistics import ChannelSums, check_channel_statistics, write_channel_statistics
from data.latents.store import ChannelSums, LatentStore, LatentWriter
from engine import world
from engine.agreement import on_first, with_one_answer
from evaluation.command import check_counts, run_command, with_progress
from evaluation.source import Source, open_source

FORMAT = 2  # raise when the same arguments would give other files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What the command line may ask for; without `data` the run's own training shards are encoded."""

    data: tuple[str, ...] = ()
    crop: int | None = None
    batch_size: int = 128
    dtype: str = "float32"
    limit: int | None = None


def extract(path: str | Path, out: Path, options: Options) -> LatentStore:
    """The store in `out`, written unless it is there already. A collective.

    Raises UserError, on every rank, for what cannot be opened, for a picture without a label, and where `out` holds
    anything else.
    """
    source, pictures, arguments = with_one_answer(lambda: _prepare(path, options))
    if not on_first(lambda: is_published(out, arguments)):
        on_first(lambda: _check_room(source, pictures.num_samples, out, options.dtype))
        with staged_by_first(out) as directory:
            tallies = world.gather_objects(with_one_answer(lambda: _encode(source, pictures, directory, options)))
            bad = sum(world.gather_objects(pictures.bad), Counter())
            on_first(lambda: _describe(directory, arguments, sum(tallies[1:], tallies[0]), bad))
    pictures.close()
    return with_one_answer(lambda: LatentStore(out))


@contextmanager
def staged_by_first(out: Path) -> Iterator[Path]:
    """Yield data.durable_files.staged_directory on all ranks: the first opens it, and publishes it at the end."""
    with ExitStack() as stack:
        on_first(lambda: bool(stack.enter_context(staged_directory(out))))
        yield out / PARTIAL
    world.barrier()  # nobody looks before it is published


def _prepare(path: str | Path, options: Options) -> tuple[Source, HeldOutImages, dict[str, Any]]:
    """What is encoded, and what tells this store from another."""
    source = open_source(path, world.device(), options.crop)
    data = options.data or (source.config.data.train if source.config else ())
    if not data:
        raise UserError("nothing to encode: there is no run to name training shards; name labelled ones with --data")
    pictures = source.pictures(data, "--data" if options.data else "data.train", options.limit)
    arguments = {
        "format": FORMAT, "tokenizer": source.latent_digest(), "crop": source.crop, "dtype": options.dtype,
        "corpus": list(data), "pictures": pictures.num_samples, "background": list(source.background),
    }  # fmt: skip
    return source, pictures, arguments


def _check_room(source: Source, count: int, out: Path, dtype: str) -> None:
    """Raises UserError where the disk of `out` cannot hold the latents: hours later it would be a pity."""
    model = source.tokenizer.model
    latent = model.latent_channels * (source.crop // model.patch_size) ** 2
    wanted = 2 * count * latent * DTYPES[dtype].itemsize
    there = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    if wanted > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"--out {out}: {count} pictures and as many mirrored ones take {wanted / 1e9:.1f} GB in {dtype}, the disk "
            f"has {free / 1e9:.1f} GB left; make room, or store them as bfloat16"
        )


def _encode(source: Source, pictures: HeldOutImages, directory: Path, options: Options) -> ChannelSums:
    """Writes this rank's files."""
    writer, device, dtype = LatentWriter(directory, world.rank()), world.device(), DTYPES[options.dtype]
    total = -(-len(pictures) // options.batch_size)
    for batch in with_progress(pictures.batches(options.batch_size), "encoding", total):
        pictures.classes.require_known()
        if (batch.labels < 0).any():
            row = int((batch.labels < 0).nonzero()[0])
            raise UserError(
                f"{batch.keys[row]} has no label (found {int(batch.labels[row])}): a generator is trained on the "
                "integer from 0 on in field `label` of the .json member, or in the .cls member; give labelled shards"
            )
        check_number_of_classes(batch.labels)
        images = batch.images.to(device)
        latents, mirrored = (source.tokenizer.encode(x).to(dtype) for x in (images, images.flip(-1)))
        writer.add(latents, mirrored, batch.labels, batch.positions)
    return writer.close()


def _describe(directory: Path, arguments: dict[str, Any], tally: ChannelSums, bad: Counter[str]) -> None:
    """Statistics and manifest. Raises UserError where there is nothing to describe, or nothing to divide by."""
    if not tally.samples:
        raise UserError(f"no picture of {arguments['corpus']} could be decoded ({dict(bad)}); mend the shards")
    mean, std = tally.statistics()
    check_channel_statistics(mean, std, f"latents in {arguments['dtype']}")
    write_channel_statistics(directory, mean, std)
    write_manifest(directory, arguments, tally.samples, bad_samples=dict(bad))


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = CommandParser(prog="python -m evaluation.latents", description="Write a corpus as latents.")
    add = parser.add_argument
    add("source", help="a run directory, a directory in the public layout, a weights file, or hf://OWNER/NAME")
    add("--data", nargs="+", default=(), metavar="SHARDS", help="labelled shards (default: the run's data.train)")
    add("--out", type=Path, required=True, help="directory of the store")
    add("--crop", type=int, help="side of the centre crop in pixels (default: the run's; 256 without one)")
    add("--batch-size", type=int, default=128, help="pictures a rank encodes together (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored latents (%(default)s)")
    add("--limit", type=int, help="encode this many samples, evenly spaced")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher's; LOCAL_RANK says the same
    given = parser.parse_args(arguments)

    def work() -> None:
        check_counts(given, "crop", "batch_size", "limit")
        options = Options(tuple(given.data), given.crop, given.batch_size, given.dtype, given.limit)
        store = extract(given.source, given.out, options)
        if world.is_first():
            _show(store)

    return run_command(work)


def _show(store: LatentStore) -> None:
    skipped = "".join(f"; {count} {reason}" for reason, count in store.notes.get("bad_samples", {}).items())
    print(
        f"{store.directory}: {store.num_samples} pictures of {store.num_classes} classes as {store.dtype} latents "
        f"{tuple(store.shape)}, channel means {store.mean.min():.3g} to {store.mean.max():.3g}, deviations "
        f"{store.std.min():.3g} to {store.std.max():.3g}{skipped}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
