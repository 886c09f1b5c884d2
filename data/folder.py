"""A directory of images as a corpus: which files, which captions, and what was left out and why.

    images = ImageFolder(Path("photos"), sidecar_captions(Path("photos")))
    build(Path("corpus"), folder_plan(images, held_out_share=0.02, shard_size=1000, vocab=None))
    images.skipped                                  # [("a.jpg", "no caption"), ("b.png", "empty file")]

Images are shuffled once and for all by a hash of their names, so that no shard holds a single folder, and the
first ones are held out. Whatever does not become a sample is in `skipped`: nothing is lost silently.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from configs import UserError
from data.caption_sources import SUFFIXES, class_of, is_image, list_files
from data.pictures import Unusable, load_picture
from data.sample import Plan, Sample
from data.synthetic.grammar import with_article

NOT_REPORTED = (".csv", ".jsonl", ".json", ".md")  # tables and notes beside the images
READ_AHEAD = 64  # images decoded at a time: bounds the memory

README = """\
# An image folder, packed

Written by `python -m data.corpus folder`. `train-*.tar` and `held_out-*.tar` are webdataset shards: a
sample is an image (jpg, png or webp; its original bytes unless it was of another format or made smaller),
its caption (txt) and its attributes (json: `file`, `width`, `height`, and `label` where the folders are
classes). `skipped.json` lists what was left out and why, `classes.json` the classes in the order of
`label`, `manifest.json` the arguments.
"""


def class_table(names: list[str]) -> list[dict[str, Any]]:
    """The classes of classes.json for these images, in the order of their labels."""
    classes = sorted({c for c in map(class_of, names) if c is not None})
    return [{"name": c, "prompts": [f"a photo of {with_article(c)}", with_article(c), c]} for c in classes]


class ImageFolder:
    """The images under `source` with their captions (relative path -> text).

    `max_side` in pixels makes larger images smaller. `with_classes` takes labels from the first folders.
    """

    def __init__(
        self, source: Path, captions: dict[str, str], max_side: int | None = None, with_classes: bool = False
    ) -> None:
        self.source, self.captions, self.max_side = source, captions, max_side
        files = list_files(source)
        self.names = sorted(filter(is_image, files), key=_shuffled)
        if not self.names:
            raise UserError(f"{source} holds {len(files)} files and no image ({' '.join(SUFFIXES)}): give another")
        self.classes = class_table(self.names) if with_classes else []
        self.labels = {entry["name"]: label for label, entry in enumerate(self.classes)}
        self.skipped = self._not_images(files)

    def split(self, held_out_share: float) -> dict[str, list[str]]:
        """The names of each split. A share above 0 holds out one image at least, and always leaves one."""
        count = max(1, round(len(self.names) * held_out_share)) if held_out_share else 0
        count = min(count, len(self.names) - 1)
        return {"train": self.names[count:], "held_out": self.names[:count]}

    def fingerprint(self) -> str:
        """16 hex digits of all that the samples depend on: names, sizes, times, captions, options."""
        files = []
        for name in self.names:
            path = self.source / name
            stat = path.stat() if path.exists() else path.lstat()  # a link may point nowhere
            files.append([name, stat.st_size, stat.st_mtime_ns, self.captions.get(name)])
        content = json.dumps([files, self.max_side, self.classes])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def samples(self, names: list[str]) -> Iterator[Sample]:
        """The samples of these images in order; images that give none are added to `skipped`."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(names), READ_AHEAD):
                chunk = names[start : start + READ_AHEAD]
                for name, sample in zip(chunk, pool.map(self._sample, chunk), strict=True):
                    if isinstance(sample, Sample):
                        yield sample
                    else:
                        self.skipped.append((name, str(sample)))

    def summary(self) -> str:
        """'3 no caption, 1 empty file': how many were left out for which reason."""
        reasons = Counter(reason.partition(":")[0] for _, reason in self.skipped)
        return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())

    def _sample(self, name: str) -> Sample | Unusable:
        caption = self.captions.get(name)
        if not caption:
            return Unusable("outside any class folder" if self.classes and caption is None else "no caption")
        try:
            image, extension, (width, height) = load_picture(self.source / name, self.max_side)
        except Unusable as reason:
            return reason
        attributes: dict[str, Any] = {"file": name, "width": width, "height": height}
        if self.labels:
            class_name = class_of(name)
            attributes |= {"label": self.labels[class_name], "class": class_name}
        return Sample(image, extension, caption, attributes)

    def _not_images(self, files: list[str]) -> list[tuple[str, str]]:
        """Files that are neither image nor caption, and captions of images that are not there."""
        stems = {PurePosixPath(name).with_suffix("") for name in self.names}
        skipped = [(name, "caption without image") for name in sorted(set(self.captions) - set(self.names))]
        for name in files:
            is_caption = name.endswith(".txt") and PurePosixPath(name).with_suffix("") in stems
            if not is_image(name) and not is_caption and not name.lower().endswith(NOT_REPORTED):
                skipped.append((name, "not an image format"))
        return skipped


def folder_plan(images: ImageFolder, held_out_share: float, shard_size: int, vocab: int | None) -> Plan:
    """The corpus of an image folder."""
    names = images.split(held_out_share)
    options = {"held_out_share": held_out_share, "shard_size": shard_size, "vocab": vocab}

    def files() -> dict[str, Any]:
        classes = {"classes.json": {"classes": images.classes}} if images.classes else {}
        skipped = [{"file": name, "reason": reason} for name, reason in images.skipped]
        return {"README": README, "skipped.json": skipped, **classes}

    return Plan(
        arguments={"kind": "folder", "content": images.fingerprint(), **options},
        splits={split: images.samples(chosen) for split, chosen in names.items()},
        counts={split: len(chosen) for split, chosen in names.items()},
        shard_size=shard_size,
        vocab=vocab,
        files=files,
    )


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
