"""List the files under a directory: which are images, and which split and class their folders name.

files = list_files(Path("photos"))
files.images                                   # ("train/red_fox/1.jpg", "train/red_fox/2.jpg", "val/red_fox/3.jpg")
folder_splits(files.images)                           # {"train": "train", "val": "held_out"}
folder_classes(files.images, level=None)              # {"train/red_fox/1.jpg": "red fox", ...}
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
from data.image_types import is_image_name

CLASS_LEVELS = ("first", "last")  # which of nested folders names the class: torchvision's way, and Hugging Face's
_SPLIT = re.compile(  # train, Val, train2017, test_images
    r"(?:(?P<train>train|training)|(?P<held_out>val|valid|validation|test|testing|dev|eval|held[-_ ]?out))"
    r"(?:[-_ ]?(?:\d{4}|set|split|data|images))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FileList:
    """The files under a directory: sorted relative paths; `left_out` has (path, reason) of what was skipped."""

    names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The files whose extension is that of a supported image type."""
        return tuple(filter(is_image_name, self.names))


def list_files(source: Path) -> FileList:
    """List all files below a directory, also through links, except hidden ones. Raises UserError for no directory."""
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
        left_out += [(above + name, "hidden file") for name in files if name.startswith(".") and is_image_name(name)]
    return FileList(tuple(sorted(names)), tuple(sorted(left_out)))


def _folder_fault(path: str, source: Path, linked: set[str]) -> str | None:
    """Return why a folder is not read: hidden, or a link to one already read, which would repeat images or loop."""
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
    """Return the path without its last extension, in NFC: equal for an image and its caption file."""
    return to_nfc(PurePosixPath(name).with_suffix("").as_posix())


def to_nfc(name: str) -> str:
    """Normalise a name to Unicode NFC: macOS stores accents decomposed, other systems do not."""
    return unicodedata.normalize("NFC", name)


def words_of(name: str) -> str:
    """Replace underscores and hyphens by spaces: 'golden_retriever' -> 'golden retriever'; "" for separators alone."""
    return " ".join(to_nfc(name).replace("_", " ").replace("-", " ").split())


def folder_splits(names: Sequence[str]) -> dict[str, str]:
    """Map top folders that are splits to train or held_out; return {} where the top folders are not splits.

    They are splits if all are named like one, or if some are named like train and some like val or test.
    """
    tops = {name.partition("/")[0] for name in names if "/" in name}
    found = {top: split for top in sorted(tops) if (split := _split_of(top))}
    return found if len(found) == len(tops) or len(set(found.values())) == 2 else {}


def folder_classes(names: Sequence[str], level: str | None) -> dict[str, str]:
    """Map each image to its class: the name of its folder as words. Images outside any folder have none.

    `level` chooses the first or the last of nested folders. Raises UserError where folders are nested and `level` is
    None, and where no image lies in a class folder.
    """
    tops = folder_splits(names)
    folders = {name: _class_folders(name, tops) for name in names}
    if not any(folders.values()):
        shown = next(iter(folders), "")
        raise UserError(
            f"--caption-from-folder: no image lies in a class folder ({shown!r}, and {len(folders) - 1} more): "
            "captions are made of folder names, as in red_fox/1.jpg; make such folders, or give --captions FILE, or "
            "cat.txt beside cat.jpg"
        )
    for name, parts in folders.items():
        if len(parts) > 1 and level is None:
            raise UserError(
                f"--caption-from-folder: {name} lies in {len(parts)} folders, so its class could be {parts[0]!r} or "
                f"{parts[-1]!r}; say which with --class-folder first or last"
            )
    class_idx = -1 if level == "last" else 0
    class_folders = {name: parts[class_idx] for name, parts in folders.items() if parts}
    return {name: words_of(folder) or folder for name, folder in class_folders.items()}


def _split_of(folder: str) -> str | None:
    match = _SPLIT.fullmatch(folder)
    return match.lastgroup if match else None


def _class_folders(name: str, tops: dict[str, str]) -> list[str]:
    """Return the folders of an image that may name its class: all but a split."""
    parts = name.split("/")[:-1]
    if not parts or not tops:
        return parts
    if parts[0] not in tops:
        raise UserError(
            f"--caption-from-folder: {name} lies beside the splits {', '.join(tops)}, in {parts[0]!r}, which is no "
            "split: either all top folders are splits or none is; move it into one"
        )
    return parts[1:]
