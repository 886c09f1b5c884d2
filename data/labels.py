"""Labels as corpora write them -> class numbers: 3, "3", "3.0", or a class name that a class table numbers.

    parse("3.0")                                    # 3
    parse(" tabby cat\\n")                           # "tabby cat"
    numbers = ClassNumbers(Path("corpus/classes.json"))
    numbers.of("Tabby_cat", key="00000/17")         # 2, its place in the table; -1 and noted where it has none

A class table is a classes.json; `read_classes` knows its form:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, {"name": "blue square"}, ...]}
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import UserError
from data import caption_text

FORM = 'write {"classes": [{"name": "tench", "prompts": ["a tench", ...]}, ...]}, prompts in all of them or in none'
_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0*)?")


def parse(value: object) -> int | str | None:
    """A number or a class name; None for what is neither, such as true, 1.5, an empty text or more than 64 bits."""
    if isinstance(value, str):
        text = value.strip()
        number = _NUMBER.fullmatch(text)
        return int(number[1]) if number else text or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


class ClassNumbers:
    """Class names -> their places in the table of `path`, which is read when the first name is looked up.

    `unknown` has the names without a place, each with the sample that had it first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unknown: dict[str, str] = {}

    def of(self, name: str, key: str) -> int:
        """The number of the class called `name`, which is that of sample `key`; -1 where the table has none."""
        number = self._by_name.get(name, self._by_form.get(_folded(name)))
        if number is None:
            self.unknown.setdefault(name, key)
            return -1
        return number

    def check(self) -> None:
        """Raises UserError where a name had no place: whoever counts by class would miss its samples."""
        for name, key in self.unknown.items():
            fault = f"{self.path} has no such class, or two" if self._by_form else f"there is no {self.path}"
            raise UserError(
                f"{key} has label {name!r}, a class name, and {fault}: names are numbered by their places in a class "
                f"table; {FORM}, in classes.json beside the shards or in --classes FILE, or write numbers as labels"
            )

    @cached_property
    def _by_name(self) -> dict[str, int | None]:
        return _places([name for name, _ in read_classes(self.path)]) if self.path.is_file() else {}

    @cached_property
    def _by_form(self) -> dict[str, int | None]:
        return _places([_folded(name) for name, _ in read_classes(self.path)]) if self.path.is_file() else {}


def read_classes(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompts) of each class of a classes.json. Raises UserError where it is missing or of another form."""
    try:
        described = json.loads(caption_text.decode(path.read_bytes()))
    except OSError:
        raise UserError(f"{path} cannot be read: it has the classes' names; give --classes FILE") from None
    except ValueError as error:
        raise UserError(f"{path} is no class table: it is not JSON ({error}); {FORM}") from None
    rows = described.get("classes") if isinstance(described, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no class table: it has no list of `classes`; {FORM}")
    return [_row(row, place, path) for place, row in enumerate(rows)]


def _row(row: Any, place: int, path: Path) -> tuple[str, tuple[str, ...]]:
    """The name and prompts of the class with the label `place`."""
    name, prompts = (row.get("name"), row.get("prompts", [])) if isinstance(row, dict) else (None, [])
    if not isinstance(name, str) or not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"{path} is no class table: class {place} is {json.dumps(row)[:80]}; {FORM}")
    return name, tuple(prompts)


def _places(names: list[str]) -> dict[str, int | None]:
    """Where each name stands; None for one that stands in two places."""
    found: dict[str, int | None] = {}
    for place, name in enumerate(names):
        found[name] = None if name in found else place
    return found


def _folded(name: str) -> str:
    """'Golden_Retriever' -> 'golden retriever'"""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())
