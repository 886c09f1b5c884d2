"""One thing the doctor looked at, in a plain sentence, and what would mend it.

carefully("FP8", check, "pip install torchao")      # check's findings; if it raises, one that says what it raised
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "broken"]  # broken: it is there and does not work


@dataclass(frozen=True)
class Finding:
    """`is_needed`: without it no run is possible. A remedy goes with everything that is not ok."""

    name: str
    state: State
    said: str
    remedy: str = ""
    is_needed: bool = False

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.remedy, f"{self.name} is {self.state}, and nobody says what to do"


def carefully(name: str, check: Callable[[], Iterable[Finding]], remedy: str, is_needed: bool = False) -> list[Finding]:
    """What `check` finds, or that it could not look. A broken library may raise anything, and end the program."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except (Exception, SystemExit) as error:
        found.append(Finding(name, "broken", first_line(error), remedy, is_needed))
    return found


def first_line(error: BaseException) -> str:
    """An error in one line: its type and what it says first."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
