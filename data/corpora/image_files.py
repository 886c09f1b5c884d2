"""Image folders: which files are images, the splits and classes their folders name, and the captions of the images.

    files = list_files(Path("photos"))
    files.images                                 # ("train/red_fox/1.jpg", "train/red_fox/2.jpg", "val/red_fox/3.jpg")
    folder_splits(files.images)                  # {"train": "train", "val": "held_out"}
    classes = folder_classes(files.images, level=None)     # {"train/red_fox/1.jpg": "red fox", ...}

    sidecar_captions(source, files)              # Captions({"a/cat.jpg": ("text of a/cat.txt",)}, {})
    table_captions(Path("captions.csv"))         # Captions({"a/cat.jpg": ("a cat",)}, {"b.jpg": "no caption"})
    folder_captions(classes)                     # Captions({"red_fox/1.jpg": ("a photo of a red fox",)}, {})

A table is read strictly: a row whose caption would be cut, or would contain other rows, is an error that names row and
line. A row without a file name or a caption is skipped and counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from configs import UserError
from data.annotations import TextDecodeError, decode_text, name_to_words, to_nfc, visible_captions
from data.corpora.synthetic_scenes import with_article
from data.image_headers import is_image_name

CLASS_LEVELS = ("first", "last")  # which of nested folders names the class: as torchvision has it, and Hugging Face
_SPLIT = re.compile(  # train, Val, train2017, test_images
    r"(?:(?P<train>train|training)|(?P<held_out>val|valid|validation|test|testing|dev|eval|held[-_ ]?out))"
    r"(?:[-_ ]?(?:\d{4}|set|split|data|images))?",
    re.IGNORECASE,
)
COLUMNS = {
    "file": ("file", "file_name"),
    "caption": ("caption", "text"),
}  # second: Hugging Face image folders
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*DELIMITERS, *JSON_LINES_SUFFIXES)
_TABLE_FORMAT = "a .csv needs the header line `file,caption`, a .jsonl one object a line with these keys"
TableRow = tuple[str, object, object]  # "row 3 (line 7)", file name, caption; None for what the row lacks


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


def path_stem(name: str) -> str:
    """Return the path without its last extension, in NFC: equal for an image and its caption file."""
    return to_nfc(PurePosixPath(name).with_suffix("").as_posix())


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
    return {name: name_to_words(folder) or folder for name, folder in class_folders.items()}


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


@dataclass(frozen=True)
class Captions:
    """The captions of images by relative path, and the reasons for images without one.

    A table row without a file name is in `refused` under its row number.
    """

    texts: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]

    def matched_to(self, names: Iterable[str]) -> Captions:
        """Rename keys to file names from which they differ only in Unicode form, backslashes or outer spaces."""
        by_form: dict[str, set[str]] = {}
        for name in names:
            by_form.setdefault(to_nfc(name), set()).add(name)
        listed = self.texts.keys() | self.refused.keys()

        def file_name(name: str) -> str:
            forms = (name, name.replace("\\", "/"), name.strip())
            found = next((by_form[form] for form in map(to_nfc, forms) if form in by_form), {name})
            return name if name in found or len(found) > 1 or found <= listed else next(iter(found))

        return Captions(
            {file_name(name): texts for name, texts in self.texts.items()},
            {file_name(name): reason for name, reason in self.refused.items()},
        )


def sidecar_captions(source: Path, files: FileList) -> Captions:
    """Read the captions of images from text files beside them: that of cat.jpg from cat.txt, else cat.jpg.txt."""
    by_stem = {path_stem(name): name for name in files.names if name.lower().endswith(".txt")}
    texts: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for name in files.images:
        path = source / (by_stem.get(path_stem(name)) or by_stem.get(to_nfc(name), ""))
        if not path.is_file():  # reading a pipe would block
            continue
        try:
            text = decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        except OSError as error:
            refused[name] = f"caption cannot be read: {error.strerror}"
        except TextDecodeError as error:
            refused[name] = f"caption is not UTF-8: {error}"
        else:
            _add_caption(name, text, texts, refused)
    return Captions(texts, refused)


def folder_captions(classes: Mapping[str, str]) -> Captions:
    """Make captions of class names: 'golden retriever' -> 'a photo of a golden retriever'."""
    return Captions({name: (f"a photo of {with_article(c)}",) for name, c in classes.items()}, {})


def table_captions(path: Path) -> Captions:
    """Read captions from the columns (.csv or .tsv with a header) or keys (.jsonl) `file` and `caption` of a table.

    In a .jsonl an image may have a list of captions. Raises UserError, naming row and line.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UserError(
            f"--captions {path} is not a supported table: supported are {' '.join(TABLE_SUFFIXES)}; {_TABLE_FORMAT}"
        )
    text = _read_table(path)
    rows = _json_rows(path, text) if suffix in JSON_LINES_SUFFIXES else _csv_rows(path, text, DELIMITERS[suffix])
    texts: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for where, name, caption in rows:
        if not isinstance(name, str) or not name.strip():
            refused[f"{path.name} {where}"] = "no file name in the table"
            continue
        name = PurePosixPath(name).as_posix()  # './a.jpg' is 'a.jpg'
        if name in texts or name in refused:
            raise UserError(
                f"--captions {path}: {where} lists {name} again: an image has one row; keep one, or give a .jsonl with "
                'a list of its captions, {"file": ..., "caption": [...]}'
            )
        _add_caption(name, caption, texts, refused)
    if not texts:
        raise UserError(f"--captions {path}: none of its {len(refused)} rows has a file and a caption; {_TABLE_FORMAT}")
    return Captions(texts, refused)


def _add_caption(name: str, caption: object, texts: dict[str, tuple[str, ...]], refused: dict[str, str]) -> None:
    if found := visible_captions(caption):
        texts[name] = found
    else:
        refused[name] = "no caption" if caption is None else "empty caption"


def _read_table(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--captions {path} cannot be read: {error.strerror}") from None
    try:
        return decode_text(data)
    except TextDecodeError as error:
        raise UserError(
            f"--captions {path}: line {data[: error.at].count(10) + 1} is not UTF-8 ({error}): a table is read as "
            "UTF-8 unless it has a byte order mark; save it as UTF-8, or as UTF-16 with its byte order mark"
        ) from None


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[TableRow]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[int, int] | None = None
    width = number = line = 0
    while True:
        where = f"row {number} (line {line + 1})"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"--captions {path}: {where} has a misplaced quote ({error}): a caption that begins with a quote "
                'must end with one, and quotes inside it are doubled, "a 5"" pipe"; correct the row'
            ) from None
        if cells is None:
            break
        if not any(cells):
            pass
        elif columns is None:
            columns, width = _columns(path, cells), len(cells)
        else:
            _check_csv_row(path, where, cells, width, delimiter)
            name, caption = (cells[i] if i < len(cells) else None for i in columns)
            yield where, name, caption
        number, line = number + any(cells), reader.line_num
    if columns is None:
        raise UserError(f"--captions {path} is empty: a table needs a header line; {_TABLE_FORMAT}")


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int]:
    """Return the column indices of file name and caption."""
    known = [cell.strip().lower() for cell in header]
    columns = [next((known.index(name) for name in names if name in known), None) for names in COLUMNS.values()]
    if None in columns:
        missing = " or ".join(list(COLUMNS.values())[columns.index(None)])
        raise UserError(
            f"--captions {path}: line 1 has no column {missing}, it has {', '.join(map(repr, header))[:200]}; "
            f"{_TABLE_FORMAT}"
        )
    return columns[0], columns[1]  # type: ignore[return-value]


def _check_csv_row(path: Path, where: str, cells: Sequence[str], width: int, delimiter: str) -> None:
    """Raise UserError where a comma cuts a caption, or where an unbalanced quote joins rows."""
    if any(cell.strip() for cell in cells[width:]):
        kind = "comma" if delimiter == "," else "tab"
        raise UserError(
            f"--captions {path}: {where} has {len(cells)} cells, the header {width}: an unquoted {kind} ends a "
            f'caption; put the caption in quotes, "{" ".join(delimiter.join(cells[width - 1 :]).split())[:60]}"'
        )
    for line in (line for cell in cells for line in cell.splitlines()[1:]):
        if is_image_name(line.partition(delimiter)[0].strip().strip('"')) and delimiter in line:
            raise UserError(
                f"--captions {path}: the caption of {where} continues over the line {line[:60]!r}, which looks like "
                "another row: a quote is not closed; close it, or write that caption on one line"
            )


def _json_rows(path: Path, text: str) -> Iterator[TableRow]:
    keys_seen: dict[str, None] = {}
    num_complete = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--captions {path}: line {number} is not a JSON object ({error}): {_TABLE_FORMAT}"
            ) from None
        row = row if isinstance(row, dict) else {}
        keys_seen |= dict.fromkeys(row)
        num_complete += all(any(key in row for key in keys) for keys in COLUMNS.values())
        name, caption = (next((row[key] for key in keys if row.get(key)), None) for keys in COLUMNS.values())
        yield f"line {number}", name, caption
    if not num_complete:
        shown = ", ".join(map(repr, keys_seen))[:200] or "none"
        raise UserError(
            f"--captions {path}: no line has a file and a caption, the keys found are {shown}; {_TABLE_FORMAT}"
        )
