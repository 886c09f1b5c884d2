"""python -m evaluation.latents RUN_OR_WEIGHTS --data SHARDS --out DIR: encode a corpus, to train generators on it.

Encodes every labelled image, centre-cropped, and its mirror image, and writes the latents with the statistics of their
channels in LightningDiT's layout (data/latents/store.py). The store is published atomically, and a second run of the
same command finds it there and does nothing. Under a launcher the ranks share the images, with the same result:

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
from data.corpus_directory import PARTIAL, is_published, staged_directory, write_manifest
from data.held_out import HeldOutImages, check_number_of_classes
from data.latents.channel_statistics import ChannelSums, check_channel_statistics, write_channel_statistics
from data.latents.store import LatentStore, LatentWriter
from engine import distributed
from engine.distributed import on_first_rank, raise_on_all_ranks
from evaluation.command import check_counts, run_command, with_progress
from evaluation.tokenizer_source import TokenizerSource, open_tokenizer

FORMAT = 2  # to be raised when the same arguments would give other files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LatentOptions:
    """Command-line options; without `data` the run's own training shards are encoded."""

    data: tuple[str, ...] = ()
    crop: int | None = None
    batch_size: int = 128
    dtype: str = "float32"
    limit: int | None = None


def write_latents(path: str | Path, out: Path, options: LatentOptions) -> LatentStore:
    """Encode a corpus and write the store `out`, unless it is there already; return the store. A collective.

    Raises UserError, on every rank, for what cannot be opened, for an image without a label, and if `out` holds
    anything else.
    """
    source, images, arguments = raise_on_all_ranks(lambda: _prepare(path, options))
    if not on_first_rank(lambda: is_published(out, arguments)):
        on_first_rank(lambda: _check_free_space(source, images.num_samples, out, options.dtype))
        with staged_by_first(out) as directory:
            tallies = distributed.gather_objects(
                raise_on_all_ranks(lambda: _encode(source, images, directory, options))
            )
            bad = sum(distributed.gather_objects(images.bad), Counter())
            on_first_rank(lambda: _finish_store(directory, arguments, sum(tallies[1:], tallies[0]), bad))
    images.close()
    return raise_on_all_ranks(lambda: LatentStore(out))


@contextmanager
def staged_by_first(out: Path) -> Iterator[Path]:
    """Stage a directory for all ranks: the first creates it, and publishes it at the end (data.corpus_directory)."""
    with ExitStack() as stack:
        on_first_rank(lambda: bool(stack.enter_context(staged_directory(out))))
        yield out / PARTIAL
    distributed.barrier()  # no rank opens the store before it is published


def _prepare(path: str | Path, options: LatentOptions) -> tuple[TokenizerSource, HeldOutImages, dict[str, Any]]:
    """Open tokenizer and images; return them with the arguments that identify the store in its manifest."""
    source = open_tokenizer(path, distributed.device(), options.crop)
    data = options.data or (source.config.data.train if source.config else ())
    if not data:
        raise UserError("nothing to encode: there is no run to name training shards; name labelled ones with --data")
    images = source.open_images(data, "--data" if options.data else "data.train", options.limit)
    arguments = {
        "format": FORMAT, "tokenizer": source.latent_digest(), "crop": source.crop, "dtype": options.dtype,
        "corpus": list(data), "pictures": images.num_samples, "background": list(source.background),
    }  # fmt: skip
    return source, images, arguments


def _check_free_space(source: TokenizerSource, count: int, out: Path, dtype: str) -> None:
    """Raise UserError, before hours of encoding, if the disk of `out` cannot hold the latents."""
    model = source.tokenizer.model
    numbers_per_latent = model.latent_channels * (source.crop // model.patch_size) ** 2
    needed = 2 * count * numbers_per_latent * DTYPES[dtype].itemsize
    existing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    if needed > (free := shutil.disk_usage(existing).free):
        raise UserError(
            f"--out {out}: {count} images and as many mirrored ones take {needed / 1e9:.1f} GB in {dtype}, the disk "
            f"has {free / 1e9:.1f} GB left; make room, or store them as bfloat16"
        )


def _encode(source: TokenizerSource, corpus: HeldOutImages, directory: Path, options: LatentOptions) -> ChannelSums:
    """Encode this rank's images and write its files."""
    writer, device, dtype = LatentWriter(directory, distributed.rank()), distributed.device(), DTYPES[options.dtype]
    total = -(-len(corpus) // options.batch_size)
    for batch in with_progress(corpus.batches(options.batch_size), "encoding", total):
        corpus.classes.require_known()
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


def _finish_store(directory: Path, arguments: dict[str, Any], tally: ChannelSums, bad: Counter[str]) -> None:
    """Write statistics and manifest. Raises UserError if there are no latents, or a channel has no deviation."""
    if not tally.samples:
        raise UserError(f"no image of {arguments['corpus']} could be decoded ({dict(bad)}); repair the shards")
    mean, std = tally.statistics()
    check_channel_statistics(mean, std, f"latents in {arguments['dtype']}")
    write_channel_statistics(directory, mean, std)
    write_manifest(directory, arguments, tally.samples, bad_samples=dict(bad))


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    parser = CommandParser(prog="python -m evaluation.latents", description="Encode a corpus as latents.")
    add = parser.add_argument
    add("source", help="a run directory, a directory in the public layout, a weights file, or hf://OWNER/NAME")
    add("--data", nargs="+", default=(), metavar="SHARDS", help="labelled shards (default: the run's data.train)")
    add("--out", type=Path, required=True, help="directory of the store")
    add("--crop", type=int, help="side of the centre crop in pixels (default: the run's; 256 without one)")
    add("--batch-size", type=int, default=128, help="images a rank encodes together (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored latents (%(default)s)")
    add("--limit", type=int, help="encode this many samples, evenly spaced")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher's; LOCAL_RANK says the same
    given = parser.parse_args(arguments)

    def work() -> None:
        check_counts(given, "crop", "batch_size", "limit")
        options = LatentOptions(tuple(given.data), given.crop, given.batch_size, given.dtype, given.limit)
        store = write_latents(given.source, given.out, options)
        if distributed.is_first():
            _show(store)

    return run_command(work)


def _show(store: LatentStore) -> None:
    skipped = "".join(f"; {count} {reason}" for reason, count in store.notes.get("bad_samples", {}).items())
    print(
        f"{store.directory}: {store.num_samples} images of {store.num_classes} classes as {store.dtype} latents "
        f"{tuple(store.shape)}, channel means {store.mean.min():.3g} to {store.mean.max():.3g}, deviations "
        f"{store.std.min():.3g} to {store.std.max():.3g}{skipped}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
