"""Captions and class labels of a sample: decoded text, visible captions, one of several drawn, labels as class numbers.

    decode_text(b"\\xff\\xfea\\x00")                        # "a": decoded by its byte order mark, else as UTF-8
    visible_captions(["a cat", None, "\\u200b"])          # ("a cat",): the others have no visible character
    draw_caption(("a cat", "a tabby"), seed=0, key="00000/17", epoch=3)   # the same on every rank and after a resume

    parse_label("3.0")                                   # 3
    parse_label(" tabby cat\\n")                          # "tabby cat"
    index = ClassIndex(Path("corpus/classes.json"))
    index.lookup("Tabby_cat", key="00000/17")            # 2, its position in the table; -1 for an unknown name

A class table is a classes.json, read by `read_classes`:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, {"name": "blue square"}, ...]}
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import UserError
from data.hashing import hash_text, hash_words

# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BOM = "\ufeff"
# Matches a visible character: not white space, control, surrogate, format, filler or replacement character.
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U000e0000-\U000e0fff]"
)
_CAPTION_HASH = hash_text("caption")  # makes the draw independent of those of crops and colours
CLASS_TABLE_FORMAT = (
    'write {"classes": [{"name": "tench", "prompts": ["a tench", ...]}, ...]}, prompts in all of them or in none'
)
_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0*)?")


class TextDecodeError(ValueError):
    """Bytes that are not valid in the encoding of their byte order mark, or in UTF-8; `at` is the first such byte."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def decode_text(data: bytes, is_cut_off: bool = False) -> str:
    """Decode a text by its byte order mark, else as UTF-8. Raises TextDecodeError rather than return wrong characters.

    `is_cut_off`: the bytes are the beginning of a longer text, which may end inside a character.
    """
    encoding = "utf-8"
    for mark, marked in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], marked
            break
    else:
        padded = data.strip(b"\0")  # NULs around a text are padding to a fixed width
        if padded.count(0) * 3 > len(padded):
            raise TextDecodeError("many bytes are NUL, as in UTF-16 without a byte order mark", data.index(0))
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data, final=not is_cut_off)
    except UnicodeDecodeError as error:
        raise TextDecodeError(f"byte {data[error.start]:#04x} is not {encoding.upper()}", error.start) from None


def visible_captions(value: object) -> tuple[str, ...]:
    """Return the captions in a string or a list of strings, without those that have no visible character."""
    texts = [text.strip().lstrip(_BOM).strip() for text in _listed(value) if isinstance(text, str)]
    return tuple(text for text in texts if _VISIBLE.search(text))


def draw_caption(captions: Sequence[str], seed: int, key: str, epoch: int) -> str:
    """Choose one of a sample's captions: a pure function of (seed, sample key, epoch)."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(hash_words(seed, _CAPTION_HASH, hash_text(key), epoch)[0]) % len(captions)]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]


def parse_label(value: object) -> int | str | None:
    """Return a label as a number or a class name; None for true, 1.5, an empty text, more than 64 bits and the like."""
    if isinstance(value, str):
        text = value.strip()
        number = _NUMBER.fullmatch(text)
        return int(number[1]) if number else text or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


class ClassIndex:
    """Class numbers by name: positions in the class table `path`, which is read at the first lookup.

    `unknown` maps names that the table lacks to the first sample that has them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unknown: dict[str, str] = {}

    def lookup(self, name: str, key: str) -> int:
        """Return the number of class `name`, the label of sample `key`; -1, and an entry in `unknown`, without one."""
        number = self._by_name.get(name, self._by_form.get(_normalised(name)))
        if number is None:
            self.unknown.setdefault(name, key)
            return -1
        return number

    def require_known(self) -> None:
        """Raise UserError where a looked-up name is not in the table: figures by class would miss its samples."""
        for name, key in self.unknown.items():
            fault = f"{self.path} has no such class, or two" if self._by_form else f"there is no {self.path}"
            raise UserError(
                f"{key} has label {name!r}, a class name, and {fault}: names are numbered by their positions in a "
                f"class table; {CLASS_TABLE_FORMAT}, in classes.json beside the shards or in --classes FILE, or write "
                "numbers as labels"
            )

    @cached_property
    def _by_name(self) -> dict[str, int | None]:
        return _index_by_name([name for name, _ in read_classes(self.path)]) if self.path.is_file() else {}

    @cached_property
    def _by_form(self) -> dict[str, int | None]:
        return _index_by_name([_normalised(name) for name, _ in read_classes(self.path)]) if self.path.is_file() else {}


def read_classes(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Read (name, prompts) of each class of a classes.json. Raises UserError where it is missing or malformed."""
    try:
        described = json.loads(decode_text(path.read_bytes()))
    except OSError:
        raise UserError(f"{path} cannot be read: the class names are taken from it; give --classes FILE") from None
    except ValueError as error:
        raise UserError(f"{path} is no class table: it is not JSON ({error}); {CLASS_TABLE_FORMAT}") from None
    rows = described.get("classes") if isinstance(described, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no class table: it has no list of `classes`; {CLASS_TABLE_FORMAT}")
    return [_parse_class(row, label, path) for label, row in enumerate(rows)]


def _parse_class(row: Any, label: int, path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the name and prompts of the class with this label. Raises UserError."""
    name, prompts = (row.get("name"), row.get("prompts", [])) if isinstance(row, dict) else (None, [])
    if not isinstance(name, str) or not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"{path} is no class table: class {label} is {json.dumps(row)[:80]}; {CLASS_TABLE_FORMAT}")
    return name, tuple(prompts)


def _index_by_name(names: list[str]) -> dict[str, int | None]:
    """Map each name to its position; to None where it occurs twice."""
    positions: dict[str, int | None] = {}
    for position, name in enumerate(names):
        positions[name] = None if name in positions else position
    return positions


def _normalised(name: str) -> str:
    """Normalise a class name for comparison: 'Golden_Retriever' -> 'golden retriever'."""
    return name_to_words(name).casefold()


def to_nfc(name: str) -> str:
    """Normalise a name to Unicode NFC: macOS stores accents decomposed, other systems do not."""
    return unicodedata.normalize("NFC", name)


def name_to_words(name: str) -> str:
    """Replace underscores and hyphens by spaces: 'golden_retriever' -> 'golden retriever'; "" for separators alone."""
    return " ".join(to_nfc(name).replace("_", " ").replace("-", " ").split())
