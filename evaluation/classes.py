"""The classes of a labelled corpus, in the order of their labels, and the prompts that stand for each.

Two forms of classes.json. A corpus that brings its own prompts is asked with those:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, ...]}

Names alone, as one has them for ImageNet, are put into the 80 templates of evaluation/templates.py:

    {"classes": [{"name": "tench"}, {"name": "goldfish"}, ...]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError
from evaluation import templates

TEMPLATES, OWN = "80 CLIP templates", "the corpus's own"
FORM = 'write {"classes": [{"name": "tench", "prompts": ["a tench", ...]}, ...]}, prompts in all of them or in none'


@dataclass(frozen=True)
class ClassTable:
    """Names of the classes in the order of their labels, their prompts, and where these come from."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    prompt_source: str = OWN

    @classmethod
    def read(cls, path: Path) -> ClassTable:
        """From a classes.json. Raises UserError where it is missing, of another form, or half with prompts."""
        rows = [_row(row, place, path) for place, row in enumerate(_rows(path))]
        names = tuple(name for name, _ in rows)
        bare = [name for name, prompts in rows if not prompts]
        if len(bare) == len(rows):
            return cls(names, tuple(map(templates.prompts, names)), TEMPLATES)
        if bare:
            raise UserError(
                f"{path}: {len(bare)} of {len(rows)} classes have no prompts (first: {bare[0]!r}): either every class "
                "has its own or none has, which asks with the 80 CLIP templates; complete or remove them"
            )
        return cls(names, tuple(prompts for _, prompts in rows))


def _rows(path: Path) -> list[Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} cannot be read: zero_shot needs the classes' names; give --classes FILE") from None
    except ValueError as error:
        raise UserError(f"{path} is no class table: it is not JSON ({error}); {FORM}") from None
    rows = described.get("classes") if isinstance(described, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no class table: it has no list of `classes`; {FORM}")
    return rows


def _row(row: Any, place: int, path: Path) -> tuple[str, tuple[str, ...]]:
    """The name and prompts of the class with the label `place`."""
    name, prompts = (row.get("name"), row.get("prompts", [])) if isinstance(row, dict) else (None, [])
    if not isinstance(name, str) or not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"{path} is no class table: class {place} is {json.dumps(row)[:80]}; {FORM}")
    return name, tuple(prompts)
