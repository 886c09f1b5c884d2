"""Parse labels into class numbers: 3, "3", "3.0", or a class name that is looked up in a class table.

    parse_label("3.0")                                    # 3
    parse_label(" tabby cat\\n")                           # "tabby cat"
    index = ClassIndex(Path("corpus/classes.json"))
    index.lookup("Tabby_cat", key="00000/17")       # 2, its position in the table; -1 for an unknown name

A class table is a classes.json; `read_classes` knows its form:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, {"name": "blue square"}, ...]}
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import UserError
from data import caption_text
from data.image_files import words_of

CLASS_TABLE_FORMAT = (
    'write {"classes": [{"name": "tench", "prompts": ["a tench", ...]}, ...]}, prompts in all of them or in none'
)
_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0*)?")


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
        described = json.loads(caption_text.decode(path.read_bytes()))
    except OSError:
        raise UserError(f"{path} cannot be read: the class names are taken from it; give --classes FILE") from None
    except ValueError as error:
        raise UserError(f"{path} is no class table: it is not JSON ({error}); {CLASS_TABLE_FORMAT}") from None
    rows = described.get("classes") if isinstance(described, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no class table: it has no list of `classes`; {CLASS_TABLE_FORMAT}")
    return [_parse_class(row, place, path) for place, row in enumerate(rows)]


def _parse_class(row: Any, place: int, path: Path) -> tuple[str, tuple[str, ...]]:
    """The name and prompts of the class with the label `place`."""
    name, prompts = (row.get("name"), row.get("prompts", [])) if isinstance(row, dict) else (None, [])
    if not isinstance(name, str) or not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"{path} is no class table: class {place} is {json.dumps(row)[:80]}; {CLASS_TABLE_FORMAT}")
    return name, tuple(prompts)


def _index_by_name(names: list[str]) -> dict[str, int | None]:
    """Map each name to its position; to None where it occurs twice."""
    found: dict[str, int | None] = {}
    for place, name in enumerate(names):
        found[name] = None if name in found else place
    return found


def _normalised(name: str) -> str:
    """Normalise a class name for comparison: 'Golden_Retriever' -> 'golden retriever'."""
    return words_of(name).casefold()
