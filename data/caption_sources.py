"""Where the captions of an image folder come from: files beside the images, one table, or the folder names.

Each source answers with a dictionary, relative path of the image -> caption.

    sidecar_captions(Path("photos"))              # {"a/cat.jpg": "text of a/cat.txt"}
    listed_captions(Path("captions.csv"))         # {"a/cat.jpg": "a cat on a mat"}
    folder_captions(Path("photos"))               # {"red_fox/1.jpg": "a photo of a red fox"}
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path, PurePosixPath

from configs import UserError
from data.synthetic.grammar import with_article

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
COLUMNS = {
    "file": ("file", "file_name"),
    "caption": ("caption", "text"),
}  # second: Hugging Face image folders


def list_files(source: Path) -> list[str]:
    """All files under `source` but hidden ones: relative paths with slashes, sorted."""
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give the directory that holds the images")
    names = []
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(source).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def is_image(name: str) -> bool:
    """By its name; what it really is shows when it is decoded."""
    return name.lower().endswith(SUFFIXES)


def sidecar_captions(source: Path) -> dict[str, str]:
    """The caption of cat.jpg is the text of cat.txt beside it."""
    texts = {}
    for name in filter(is_image, list_files(source)):
        path = (source / name).with_suffix(".txt")
        if path.is_file():
            texts[name] = path.read_text(encoding="utf-8", errors="replace").strip()
    return texts


def folder_captions(source: Path) -> dict[str, str]:
    """'golden_retriever/7.jpg' -> 'a photo of a golden retriever'."""
    classes = {name: class_of(name) for name in filter(is_image, list_files(source))}
    return {name: f"a photo of {with_article(c)}" for name, c in classes.items() if c is not None}


def listed_captions(path: Path) -> dict[str, str]:
    """The columns (.csv with a header) or keys (.jsonl) `file` and `caption` of a table."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix.lower() == ".csv"
            rows = list(csv.DictReader(file)) if is_csv else [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"--captions {path} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"--captions {path} is neither a .csv with a header nor a .jsonl: {error}") from None
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name, caption = (_column(path, number, row, kind) for kind in ("file", "caption"))
        name = PurePosixPath(name).as_posix()  # './a.jpg' is 'a.jpg'
        if name in captions:
            raise UserError(f"--captions {path}: entry {number} lists {name} again: an image has one caption; keep one")
        captions[name] = caption.strip()
    return captions


def class_of(name: str) -> str | None:
    """The first folder of a relative path, as words; None for a file outside any folder."""
    folder, slash, _ = name.partition("/")
    return " ".join(folder.replace("_", " ").replace("-", " ").split()) or folder if slash else None


def _column(path: Path, number: int, row: object, kind: str) -> str:
    for column in COLUMNS[kind]:
        if isinstance(row, dict) and isinstance(row.get(column), str):
            return str(row[column])
    raise UserError(
        f"--captions {path}: entry {number} has no text under {' or '.join(COLUMNS[kind])}: a .csv needs the "
        "header line `file,caption`, a .jsonl one object a line with these keys"
    )
