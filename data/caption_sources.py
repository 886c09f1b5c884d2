"""Where the captions of an image folder come from: files beside the images, one table, or the folder names.

    sidecar_captions(source, files)              # Captions({"a/cat.jpg": ("text of a/cat.txt",)}, {})
    table_captions(Path("captions.csv"))         # Captions({"a/cat.jpg": ("a cat",)}, {"b.jpg": "no caption"})
    folder_captions(classes)                     # Captions({"red_fox/1.jpg": ("a photo of a red fox",)}, {})

A table is read strictly: what would cut a caption or swallow rows is an error that names row and line. What one row
lacks costs that row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from configs import UserError
from data import caption_text
from data.image_files import Files, composed, stem
from data.picture_types import is_picture_name
from data.synthetic.grammar import with_article

COLUMNS = {
    "file": ("file", "file_name"),
    "caption": ("caption", "text"),
}  # second: Hugging Face image folders
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson", ".json")
TABLES = (*DELIMITERS, *LINES)
_FORM = "a .csv needs the header line `file,caption`, a .jsonl one object a line with these keys"


@dataclass(frozen=True)
class Captions:
    """By the image's relative path: its captions, one at least, or the reason why it has none.

    What a table refuses without an image's name stands under its row.
    """

    texts: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]

    def of(self, names: Iterable[str]) -> Captions:
        """The same under the names of these files: a table may have another Unicode form, back slashes, or spaces."""
        by_form: dict[str, set[str]] = {}
        for name in names:
            by_form.setdefault(composed(name), set()).add(name)
        listed = self.texts.keys() | self.refused.keys()

        def known_as(name: str) -> str:
            forms = (name, name.replace("\\", "/"), name.strip())
            found = next((by_form[form] for form in map(composed, forms) if form in by_form), {name})
            return name if name in found or len(found) > 1 or found <= listed else next(iter(found))

        return Captions(
            {known_as(name): texts for name, texts in self.texts.items()},
            {known_as(name): reason for name, reason in self.refused.items()},
        )


def sidecar_captions(source: Path, files: Files) -> Captions:
    """The caption of cat.jpg is the text of cat.txt beside it, or of cat.jpg.txt, as in shards."""
    by_stem = {stem(name): name for name in files.names if name.lower().endswith(".txt")}
    texts: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for name in files.images:
        path = source / (by_stem.get(stem(name)) or by_stem.get(composed(name), ""))
        if not path.is_file():  # a pipe would be waited for
            continue
        try:
            text = caption_text.decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        except OSError as error:
            refused[name] = f"caption cannot be read: {error.strerror}"
        except caption_text.NotText as error:
            refused[name] = f"caption is not UTF-8: {error}"
        else:
            _enter(name, text, texts, refused)
    return Captions(texts, refused)


def folder_captions(classes: Mapping[str, str]) -> Captions:
    """'golden retriever' -> 'a photo of a golden retriever', for each image of the class."""
    return Captions({name: (f"a photo of {with_article(c)}",) for name, c in classes.items()}, {})


def table_captions(path: Path) -> Captions:
    """The columns (.csv or .tsv with a header) or keys (.jsonl) `file` and `caption` of a table.

    In a .jsonl an image may have a list of captions. Raises UserError, naming row and line.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"--captions {path} is no table that is read: those are {' '.join(TABLES)}; {_FORM}")
    text = _read(path)
    rows = _json_rows(path, text) if suffix in LINES else _csv_rows(path, text, DELIMITERS[suffix])
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
        _enter(name, caption, texts, refused)
    if not texts:
        raise UserError(f"--captions {path}: none of its {len(refused)} rows has a file and a caption; {_FORM}")
    return Captions(texts, refused)


def _enter(name: str, caption: object, texts: dict[str, tuple[str, ...]], refused: dict[str, str]) -> None:
    if found := caption_text.texts(caption):
        texts[name] = found
    else:
        refused[name] = "no caption" if caption is None else "empty caption"


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--captions {path} cannot be read: {error.strerror}") from None
    try:
        return caption_text.decode(data)
    except caption_text.NotText as error:
        raise UserError(
            f"--captions {path}: line {data[: error.at].count(10) + 1} is not UTF-8 ({error}): another encoding would "
            "become other letters; save the table as UTF-8, or as UTF-16 with its byte order mark"
        ) from None


Row = tuple[str, object, object]  # "row 3 (line 7)", file name, caption; None for what the row lacks


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[int, int] | None = None
    width = number = line = 0
    while True:
        where = f"row {number} (line {line + 1})"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"--captions {path}: {where} has a quote out of place ({error}): a caption that begins with a quote "
                'ends with one, and quotes inside it are doubled, "a 5"" pipe"; mend the row'
            ) from None
        if cells is None:
            break
        if not any(cells):
            pass
        elif columns is None:
            columns, width = _columns(path, cells), len(cells)
        else:
            _check_cells(path, where, cells, width, delimiter)
            name, caption = (cells[i] if i < len(cells) else None for i in columns)
            yield where, name, caption
        number, line = number + any(cells), reader.line_num
    if columns is None:
        raise UserError(f"--captions {path} is empty, no line of it is a header: {_FORM}")


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int]:
    """The places of file name and caption."""
    known = [cell.strip().lower() for cell in header]
    places = [next((known.index(name) for name in names if name in known), None) for names in COLUMNS.values()]
    if None in places:
        missing = " or ".join(list(COLUMNS.values())[places.index(None)])
        raise UserError(
            f"--captions {path}: line 1 has no column {missing}, it has {', '.join(map(repr, header))[:200]}; {_FORM}"
        )
    return places[0], places[1]  # type: ignore[return-value]


def _check_cells(path: Path, where: str, cells: Sequence[str], width: int, delimiter: str) -> None:
    """Raises UserError where a comma has cut a caption, or an unbalanced quote has swallowed rows."""
    if any(cell.strip() for cell in cells[width:]):
        kind = "comma" if delimiter == "," else "tab"
        raise UserError(
            f"--captions {path}: {where} has {len(cells)} cells, the header {width}: a {kind} inside a caption would "
            f'cut it; put the caption in quotes, "{" ".join(delimiter.join(cells[width - 1 :]).split())[:60]}"'
        )
    for line in (line for cell in cells for line in cell.splitlines()[1:]):
        if is_picture_name(line.partition(delimiter)[0].strip().strip('"')) and delimiter in line:
            raise UserError(
                f"--captions {path}: the caption of {where} goes on over the line {line[:60]!r}, which looks like a "
                "row: a quote is not closed; mend it, or write that caption on one line"
            )


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    keys_seen: dict[str, None] = {}
    num_whole = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--captions {path}: line {number} is no JSON object ({error}): {_FORM}") from None
        row = row if isinstance(row, dict) else {}
        keys_seen |= dict.fromkeys(row)
        num_whole += all(any(key in row for key in keys) for keys in COLUMNS.values())
        name, caption = (next((row[key] for key in keys if row.get(key)), None) for keys in COLUMNS.values())
        yield f"line {number}", name, caption
    if not num_whole:
        shown = ", ".join(map(repr, keys_seen))[:200] or "no keys"
        raise UserError(f"--captions {path}: no line has a file and a caption, they have {shown}; {_FORM}")
