"""The classes of a labelled corpus, in the order of their labels, and the prompts that stand for each.

Two forms of classes.json. A corpus that brings its own prompts is asked with those:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, ...]}

Names alone, as one has them for ImageNet, are put into the 80 templates of evaluation/templates.py:

    {"classes": [{"name": "tench"}, {"name": "goldfish"}, ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs import UserError
from data.annotations import read_classes
from evaluation import templates

TEMPLATES, OWN = "80 CLIP templates", "the corpus's own"


@dataclass(frozen=True)
class ClassTable:
    """Names of the classes in the order of their labels, their prompts, and where these come from."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    prompt_source: str = OWN

    @classmethod
    def read(cls, path: Path) -> ClassTable:
        """From a classes.json. Raises UserError where it is missing, of another form, or half with prompts."""
        rows = read_classes(path)
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
