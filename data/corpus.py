"""Write a corpus: shards, tokenizer, class table, manifest. The one door to `webdataset`.

    python -m data.corpus synthetic --out demo_data --samples 6000 --held-out 1024
    python -m data.corpus emoji --out emoji_data --samples 12000 --held-out 2000 --size 32 --classes 100
    python -m data.corpus folder photos --out corpus --caption-from-folder --train-tokenizer 4096

    demo_data/train-000000.tar ... held_out-000000.tar ... tokenizer.json classes.json manifest.json README

The same arguments give the same bytes in every file (with the same Pillow). A corpus appears whole or not at
all, and a second run of the same command recognises it and does nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from configs import UserError
from configs.command_line import CommandParser, seed
from data.corpora.emoji_classes import EmojiFont
from data.corpora.emoji_scenes import emoji_plan
from data.corpora.folder import HELD_OUT_SHARE, ImageFolder, folder_plan
from data.corpora.image_files import (
    CLASS_LEVELS,
    TABLE_SUFFIXES,
    folder_captions,
    folder_classes,
    list_files,
    sidecar_captions,
    table_captions,
)
from data.corpora.samples import CorpusPlan, CorpusSample
from data.corpora.synthetic_images import synthetic_plan
from data.corpus_directory import is_published, staged_directory, write_json, write_manifest
from data.image_headers import IMAGE_EXTS
from data.processes import NUM_CORES

# torch is slow to import and the drawing processes import this module: webdataset and data.captions, which
# need it, are imported where they are used.

PROGRESS_SECONDS = 60  # between two lines of progress where there is no terminal
FORMAT = 1  # raise when the same arguments would give another corpus: scenes, grammar or layout have changed

ShardCounts = dict[str, int]  # shard name -> number of samples


def build(out: Path, plan: CorpusPlan) -> ShardCounts | None:
    """Write the planned corpus into the directory `out`; return its shards, or None where it is there already.

    Raises UserError where `out` holds something else or the plan has no train sample; then nothing is
    written.
    """
    arguments = {"format": FORMAT, **plan.arguments}
    if is_published(out, arguments):
        return None
    with staged_directory(out) as staging:
        shards: ShardCounts = {}
        captions: dict[str, list[str]] = {split: [] for split in plan.splits}
        for split, samples in plan.splits.items():
            collected = _collect_captions(show_progress(samples, split, plan.counts[split]), captions[split])
            shards |= write_shards(collected, staging, split, plan.shard_size)
        if not captions["train"]:
            raise UserError(f"no train sample for --out {out}: every image was left out; see the reasons")
        for name, content in plan.files().items():
            if isinstance(content, str):
                (staging / name).write_text(content, encoding="utf-8")
            else:
                write_json(staging / name, content)
        if plan.vocab is not None:
            _train_tokenizer(captions["train"], plan.vocab, staging / "tokenizer.json")
        write_manifest(staging, arguments, shards)
    return shards


def write_shards(samples: Iterable[CorpusSample], directory: Path, split: str, shard_size: int) -> ShardCounts:
    """Write SPLIT-000000.tar ... of at most `shard_size` samples each; return their numbers of samples.

    A key is the sample's number in its split; every header field is fixed, so equal samples give equal bytes.
    """
    import webdataset

    shards: ShardCounts = {}
    for number, shard in itertools.groupby(enumerate(samples), key=lambda pair: pair[0] // shard_size):
        name = f"{split}-{number:06d}.tar"
        with (directory / name).open("wb") as file:
            with webdataset.TarWriter(file, user="", group="", encoder=False, mtime=0) as tar:
                for index, sample in shard:
                    tar.write({"__key__": f"{index:09d}", **sample.members()})
                    shards[name] = index % shard_size + 1
            file.flush()
            os.fsync(file.fileno())
    return shards


def _collect_captions(samples: Iterable[CorpusSample], captions: list[str]) -> Iterator[CorpusSample]:
    """Yield the samples and append all their captions to the list."""
    for sample in samples:
        captions += sample.attributes.get("captions") or [sample.caption]
        yield sample


def show_progress(samples: Iterable[CorpusSample], split: str, count: int) -> Iterator[CorpusSample]:
    """Yield the samples and show progress: a bar on a terminal, elsewhere a line a minute."""
    if sys.stderr.isatty() and count:
        from rich.console import Console
        from rich.progress import track

        yield from track(samples, split, total=count, console=Console(stderr=True))
        return
    started = shown = time.monotonic()
    for done, sample in enumerate(samples, start=1):
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            left = (shown - started) / done * (count - done)
            print(f"{split}: {done} of {count}, about {left / 60:.0f} minutes left", file=sys.stderr, flush=True)
        yield sample


def _train_tokenizer(captions: list[str], vocab: int, path: Path) -> None:
    from data.captions import train_bpe

    train_bpe(captions, vocab).save(str(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 the machine failed, 2 an error that the user can correct."""
    options = _parser().parse_args(argv)
    started = time.monotonic()
    try:
        shards = options.run(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 1
    if shards is None:
        print(f"{options.out} already holds this corpus; nothing to do")
        return 0
    for split in ("train", "held_out"):
        counts = [count for name, count in shards.items() if name.startswith(split)]
        print(f"{split}: {sum(counts)} samples in {len(counts)} shards")
    print(f"wrote {options.out} in {time.monotonic() - started:.1f} s")
    return 0


def _synthetic(options: argparse.Namespace) -> ShardCounts | None:
    o = options
    return build(o.out, synthetic_plan(o.samples, o.held_out, o.size, o.shard_size, o.seed, o.workers))


def _emoji(options: argparse.Namespace) -> ShardCounts | None:
    o, font = options, EmojiFont.find(options.font)
    return build(o.out, emoji_plan(font, o.classes, o.samples, o.held_out, o.size, o.shard_size, o.seed, o.workers))


def _folder(options: argparse.Namespace) -> ShardCounts | None:
    o = options
    if o.class_folder and not o.caption_from_folder:
        raise UserError("--class-folder has an effect with --caption-from-folder alone: add that, or leave it out")
    files = list_files(o.source)
    classes = folder_classes(files.images, o.class_folder) if o.caption_from_folder and files.images else {}
    if o.captions is not None:
        captions = table_captions(o.captions)
    else:
        captions = folder_captions(classes) if o.caption_from_folder else sidecar_captions(o.source, files)
    images = ImageFolder(o.source, files, captions, o.max_side, classes, o.workers)
    print(f"{o.source}: {len(images.names)} images, {len(images.captioned)} with captions", flush=True)
    plan = folder_plan(images, o.held_out_share, o.shard_size, o.train_tokenizer)
    # Pillow warns of odd metadata on several lines each; that pixels do not decode is an error, not a
    # warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return build(o.out, plan)
        finally:
            if images.skipped:
                print(f"left out {len(images.skipped)}: {images.summary()}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m data.corpus", description="Write a corpus of webdataset shards.")
    commands = parser.add_subparsers(required=True, metavar="synthetic | emoji | folder")
    _add_synthetic(commands.add_parser("synthetic", help="draw a captioned demo corpus"))
    _add_emoji(commands.add_parser("emoji", help="draw captioned scenes from a colour emoji font"))
    _add_folder(commands.add_parser("folder", help="pack a directory of images"))
    return parser


def _add_synthetic(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_synthetic)
    _add_drawn(command)


def _add_emoji(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_emoji)
    _add_drawn(command)
    add = command.add_argument
    add(
        "--classes", type=_at_least(2), default=100, help="number of classes, those that look least alike (default 100)"
    )
    add("--font", type=Path, metavar="FILE", help="colour emoji font (default: Noto Color Emoji of the system)")


def _add_drawn(command: argparse.ArgumentParser) -> None:
    """Add the options of every drawn corpus."""
    add = command.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    add("--samples", type=_at_least(1), required=True, help="number of train images")
    add("--held-out", type=_at_least(0), default=0, help="number of held-out images (default 0)")
    add("--size", type=_at_least(16), default=64, help="side in pixels (default 64)")
    add("--shard-size", type=_at_least(1), default=256, help="images in a shard (default 256)")
    add("--seed", type=seed, default=0, help="another seed, other images (default 0)")
    _add_workers(command)


def _add_workers(command: argparse.ArgumentParser) -> None:
    text = f"processes; changes the time only (default {NUM_CORES})"
    command.add_argument("--workers", type=_at_least(1), default=NUM_CORES, help=text)


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_folder)
    add = command.add_argument
    kinds = " ".join(IMAGE_EXTS)
    add("source", type=Path, metavar="SRC", help=f"directory of images ({kinds}); train and val folders are splits")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    captions = command.add_mutually_exclusive_group()
    table = f"a table ({' '.join(TABLE_SUFFIXES)}) with columns file, caption (default: cat.txt beside cat.jpg)"
    captions.add_argument("--captions", type=Path, metavar="FILE", help=table)
    named = "red_fox/1.jpg becomes 'a photo of a red fox', and the folders become classes"
    captions.add_argument("--caption-from-folder", action="store_true", help=named)
    add("--class-folder", choices=CLASS_LEVELS, help="which of nested folders is the class, as in animals/fox/1.jpg")
    share = f"held out of the images with captions (default {HELD_OUT_SHARE}; none where val or test folders are)"
    add("--held-out-share", type=_share, metavar="SHARE", help=share)
    add("--shard-size", type=_at_least(1), default=1000, help="images in a shard (default 1000)")
    add("--max-side", type=_at_least(16), metavar="PX", help="make larger images smaller (default: keep)")
    add("--train-tokenizer", type=_at_least(259), metavar="VOCAB", help="train tokenizer.json on the captions")
    _add_workers(command)


class _at_least:
    """Argument type: a whole number with a lower bound."""

    def __init__(self, bound: int) -> None:
        self.bound = bound

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = self.bound - 1
        if number < self.bound:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {self.bound}")
        return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return share


if __name__ == "__main__":
    sys.exit(main())
