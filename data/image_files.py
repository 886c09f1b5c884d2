"""The files under a directory: which of them are images, and what their folders say of split and class.

files = list_files(Path("photos"))
files.images                                   # ("train/red_fox/1.jpg", "train/red_fox/2.jpg", "val/red_fox/3.jpg")
splits(files.images)                           # {"train": "train", "val": "held_out"}
classes(files.images, level=None)              # {"train/red_fox/1.jpg": "red fox", ...}
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from configs import UserError
from data.picture_types import is_picture_name

LEVELS = ("first", "last")  # which of nested folders names the class: torchvision's way, and Hugging Face's
_SPLIT = re.compile(  # train, Val, train2017, test_images
    r"(?:(?P<train>train|training)|(?P<held_out>val|valid|validation|test|testing|dev|eval|held[-_ ]?out))"
    r"(?:[-_ ]?(?:\d{4}|set|split|data|images))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Files:
    """Relative paths with slashes, sorted; `left_out` has (path, reason) of what was seen and not looked into."""

    names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Those that their names call images."""
        return tuple(filter(is_picture_name, self.names))


def list_files(source: Path) -> Files:
    """Goes through all folders below, linked ones too, but hidden ones. Raises UserError where `source` is none."""
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give the directory that holds the images")
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    linked = {os.path.realpath(source)}

    def relative(path: str) -> str:
        return Path(path).relative_to(source).as_posix()

    def unreadable(error: OSError) -> None:
        left_out.append((f"{relative(str(error.filename))}/", f"folder cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(source, onerror=unreadable, followlinks=True):
        above = "" if folder == str(source) else f"{relative(folder)}/"
        for name in sorted(folders):
            if reason := _folder_fault(os.path.join(folder, name), source, linked):
                left_out.append((f"{above}{name}/", reason))
                folders.remove(name)
        folders.sort()
        names += [above + name for name in files if not name.startswith(".")]
        left_out += [(above + name, "hidden file") for name in files if name.startswith(".") and is_picture_name(name)]
    return Files(tuple(sorted(names)), tuple(sorted(left_out)))


def _folder_fault(path: str, source: Path, linked: set[str]) -> str | None:
    """Why a folder is not gone into: no picture is taken twice, and no walk goes in circles."""
    if os.path.basename(path).startswith("."):
        return "hidden folder"
    if not os.path.islink(path):
        return None
    target = os.path.realpath(path)
    is_inside = any(os.path.commonpath([target, known]) == known for known in linked)
    if is_inside or os.path.commonpath([target, os.path.realpath(source)]) == target:
        return "link to a folder that is read already"
    linked.add(target)
    return None


def stem(name: str) -> str:
    """What an image and its caption's file have in common: the path without its last extension, in one form."""
    return composed(PurePosixPath(name).with_suffix("").as_posix())


def composed(name: str) -> str:
    """The same name in the Unicode form NFC: macOS and tables of other systems write one accent in two ways."""
    return unicodedata.normalize("NFC", name)


def splits(names: Sequence[str]) -> dict[str, str]:
    """Top folder -> train or held_out, where the top folders are splits; empty where they are anything else.

    They are where all are named like splits, or some like train and some like val or test.
    """
    tops = {name.partition("/")[0] for name in names if "/" in name}
    found = {top: split for top in sorted(tops) if (split := _split_of(top))}
    return found if len(found) == len(tops) or len(set(found.values())) == 2 else {}


def classes(names: Sequence[str], level: str | None) -> dict[str, str]:
    """Image -> class, the folder that it lies in, as words; images outside any folder have none.

    `level` says which of nested folders it is, the first or the last one. Raises UserError where that is not said and
    matters, and where no image lies in a folder but that of a split.
    """
    tops = splits(names)
    folders = {name: _class_folders(name, tops) for name in names}
    if not any(folders.values()):
        shown = next(iter(folders), "")
        raise UserError(
            f"--caption-from-folder: no image lies in the folder of a class ({shown!r}, and {len(folders) - 1} more): "
            "captions are made of folder names, as in red_fox/1.jpg; make such folders, or give --captions FILE, or "
            "cat.txt beside cat.jpg"
        )
    for name, parts in folders.items():
        if len(parts) > 1 and level is None:
            raise UserError(
                f"--caption-from-folder: {name} lies in {len(parts)} folders, so its class could be {parts[0]!r} or "
                f"{parts[-1]!r}; say which with --class-folder first or last"
            )
    return {name: _as_words(parts[-1 if level == "last" else 0]) for name, parts in folders.items() if parts}


def _split_of(folder: str) -> str | None:
    match = _SPLIT.fullmatch(folder)
    return match.lastgroup if match else None


def _class_folders(name: str, tops: dict[str, str]) -> list[str]:
    """The folders of an image that may name its class."""
    parts = name.split("/")[:-1]
    if not parts or not tops:
        return parts
    if parts[0] not in tops:
        raise UserError(
            f"--caption-from-folder: {name} lies beside the splits {', '.join(tops)}, in {parts[0]!r}, which is none: "
            "either all top folders are splits or none is; move it into one"
        )
    return parts[1:]


def _as_words(folder: str) -> str:
    return " ".join(composed(folder).replace("_", " ").replace("-", " ").split()) or folder
