"""The corpus of an image folder: images in shuffled order, their captions and labels, and what was left out and why.

    files = list_files(Path("photos"))
    images = ImageFolder(Path("photos"), files, sidecar_captions(Path("photos"), files))
    build(Path("corpus"), folder_plan(images, held_out_share=0.02, shard_size=1000, vocab=None))
    images.skipped                                  # [("a.jpg", "no caption"), ("b.png", "empty file")]

Images are shuffled by a hash of their names, so that no shard holds a single folder, and the first ones that have
captions are held out; where the top folders are splits, those of val and test are. Every file that does not become a
sample is in `skipped`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from configs import UserError
from data.corpora.image_files import TABLE_SUFFIXES, Captions, FileList, folder_splits, path_stem
from data.corpora.samples import CorpusPlan, CorpusSample, ImageFile, UnusableImage, load_image
from data.corpora.synthetic_scenes import with_article
from data.image_headers import IMAGE_EXTS, unsupported_type
from data.processes import map_in_order

NOT_REPORTED = (*TABLE_SUFFIXES, ".md")  # tables and notes beside the images
# Below both, starting processes takes longer than decoding. The count is for drawings: few bytes, many pixels.
MIN_POOL_BYTES, MIN_POOL_IMAGES = 16 << 20, 128
HELD_OUT_SHARE = 0.02

README = """\
# An image folder, packed

Written by `python -m data.corpus folder`. `train-*.tar` and `held_out-*.tar` are webdataset shards: a
sample is an image (jpg, png or webp; its original bytes unless it was of another format or made smaller),
its caption (txt) and its attributes (json: `file`, `width`, `height`, `label` where the folders are
classes, and `captions` where an image has several: data.caption=json:captions draws one of them each epoch).
`skipped.json` lists what was left out and why, `classes.json` the classes in the order of `label`,
`manifest.json` the arguments.
"""


def folder_class_table(names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the entries of classes.json for the classes of these images, in the order of their labels."""
    classes = sorted(set(names.values()))
    return [{"name": c, "prompts": [f"a photo of {with_article(c)}", with_article(c), c]} for c in classes]


class ImageFolder:
    """The images under `source` with their captions.

    `classes` (image -> class) gives labels, `max_side` in pixels makes larger images smaller, `workers` processes
    decode them. Raises UserError where there is no image with a caption.
    """

    def __init__(
        self,
        source: Path,
        files: FileList,
        captions: Captions,
        max_side: int | None = None,
        classes: Mapping[str, str] | None = None,
        workers: int = 1,
    ) -> None:
        self.source, self.max_side, self.workers = source, max_side, workers
        if not files.images:
            raise UserError(
                f"{source} holds {len(files.names)} files and no image ({' '.join(IMAGE_EXTS)})"
                + "".join(f", {name} is left out: {reason}" for name, reason in files.left_out[:1])
                + "; give the directory that holds the images"
            )
        self.names = sorted(files.images, key=_shuffle_key)
        self.captions = captions.matched_to(files.images)
        self.captioned = [name for name in self.names if name in self.captions.texts]
        self.class_of = classes or {}
        self.classes = folder_class_table(self.class_of)
        self.labels = {entry["name"]: label for label, entry in enumerate(self.classes)}
        self.skipped = self._without_image(files) + self._without_caption()
        if not self.captioned:
            raise UserError(
                f"{source}: none of its {len(self.names)} images has a caption ({self.summary()}; the first image is "
                f"{files.images[0]}): write cat.txt beside cat.jpg, or give --captions FILE, with names relative to "
                f"{source}, or --caption-from-folder"
            )

    def split(self, held_out_share: float | None) -> dict[str, list[str]]:
        """Return the names of the captioned images of each split.

        Split folders decide where there are any. Else a share above 0 holds out at least one image and leaves one.
        """
        if self.split_of_folder:
            by_split: dict[str, list[str]] = {"train": [], "held_out": []}
            for name in self.captioned:
                by_split[self.split_of_folder.get(name.partition("/")[0], "train")].append(name)
            return by_split
        share = HELD_OUT_SHARE if held_out_share is None else held_out_share
        count = max(1, round(len(self.captioned) * share)) if share else 0
        count = min(count, len(self.captioned) - 1)
        return {"train": self.captioned[count:], "held_out": self.captioned[:count]}

    @cached_property
    def split_of_folder(self) -> dict[str, str]:
        """Top folder -> train or held_out; empty unless there are folders of both."""
        splits = folder_splits(self.names)
        return splits if len(set(splits.values())) == 2 else {}

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify names, sizes and times of the files, captions and options."""
        files = []
        for name in self.names:
            path = self.source / name
            stat = path.stat() if path.exists() else path.lstat()  # a link may point nowhere
            texts = self.captions.texts.get(name, (None,))
            files.append([name, stat.st_size, stat.st_mtime_ns, texts[0] if len(texts) == 1 else texts])
        content = json.dumps([files, self.max_side, self.classes])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def samples(self, names: list[str]) -> Iterator[CorpusSample]:
        """Yield the samples of these images in order; add unusable images to `skipped`."""
        num_bytes = sum(path.stat().st_size for name in names if (path := self.source / name).is_file())
        is_large = num_bytes >= MIN_POOL_BYTES or len(names) >= MIN_POOL_IMAGES
        workers = self.workers if is_large else 1
        load = partial(_load, self.source, self.max_side)
        for name, loaded in zip(names, map_in_order(load, names, workers), strict=True):
            if isinstance(loaded, UnusableImage):
                self.skipped.append((name, str(loaded)))
            else:
                yield self._sample(name, loaded)

    def summary(self) -> str:
        """Return the numbers left out by reason: '3 no caption, 1 empty file'."""
        reasons = Counter(reason.partition(":")[0] for _, reason in self.skipped)
        return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())

    def _sample(self, name: str, file: ImageFile) -> CorpusSample:
        image, extension, (width, height) = file
        texts = self.captions.texts[name]
        attributes: dict[str, Any] = {"file": name, "width": width, "height": height}
        if self.labels:
            class_name = self.class_of[name]
            attributes |= {"label": self.labels[class_name], "class": class_name}
        if len(texts) > 1:
            attributes["captions"] = list(texts)
        return CorpusSample(image, extension, texts[0], attributes)

    def _without_caption(self) -> list[tuple[str, str]]:
        missing = "outside any class folder" if self.classes else "no caption"
        return [
            (name, self.captions.refused.get(name, missing)) for name in self.names if name not in self.captions.texts
        ]

    def _without_image(self, files: FileList) -> list[tuple[str, str]]:
        """List files that are neither image nor caption, folders that were not read, and captions without an image."""
        known = set(self.names)
        skipped = [(name, "caption without image") for name in sorted(self.captions.texts.keys() - known)]
        skipped += [(name, reason) for name, reason in sorted(self.captions.refused.items()) if name not in known]
        images = [name for name in files.names if name in known or unsupported_type(name)]
        stems = set(map(path_stem, images))
        for name in files.names:
            is_caption = name.lower().endswith(".txt") and path_stem(name) in stems
            if reason := unsupported_type(name):
                skipped.append((name, reason))
            elif name not in known and not is_caption and not name.lower().endswith(NOT_REPORTED):
                skipped.append((name, "not an image format"))
        return [*skipped, *files.left_out]


def folder_plan(images: ImageFolder, held_out_share: float | None, shard_size: int, vocab: int | None) -> CorpusPlan:
    """Return the plan of an image folder's corpus. Raises UserError for a share where the folders are splits."""
    if images.split_of_folder and held_out_share is not None:
        raise UserError(
            f"--held-out-share {held_out_share}: the folders of {images.source} are splits ("
            + ", ".join(f"{folder}: {split}" for folder, split in images.split_of_folder.items())
            + "), which decide what is held out; leave it out, or rename the folders"
        )
    names = images.split(held_out_share)
    share = None if images.split_of_folder else HELD_OUT_SHARE if held_out_share is None else held_out_share
    options = {"held_out_share": share, "shard_size": shard_size, "vocab": vocab}

    def files() -> dict[str, Any]:
        classes = {"classes.json": {"classes": images.classes}} if images.classes else {}
        skipped = [{"file": name, "reason": reason} for name, reason in images.skipped]
        return {"README": README, "skipped.json": skipped, **classes}

    return CorpusPlan(
        arguments={"kind": "folder", "content": images.fingerprint(), **options},
        splits={split: images.samples(chosen) for split, chosen in names.items()},
        counts={split: len(chosen) for split, chosen in names.items()},
        shard_size=shard_size,
        vocab=vocab,
        files=files,
    )


def _load(source: Path, max_side: int | None, name: str) -> ImageFile | UnusableImage:
    try:
        return load_image(source / name, max_side)
    except UnusableImage as reason:
        return reason


def _shuffle_key(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
