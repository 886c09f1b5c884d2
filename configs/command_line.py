"""The parser of every command: options in full, a mistake is one line and exit code 2.

parser = CommandParser(prog="python -m profiling.plan", description=__doc__)
parser.add_argument("--json", type=output_file)      # its directory is there from now on, or it is a mistake
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """argparse without abbreviations: `--max-restart` must not be taken for `--max-restarts` today, and for another
    option once there is one. Parsers of subcommands are of this class too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Ends the program: what is wrong in one line on stderr, exit code 2."""
        print(f"error: {self.explained(message)}", file=sys.stderr)
        raise SystemExit(2)

    def explained(self, message: str) -> str:
        """argparse's message with a remedy: the nearest option, or --help."""
        if message.startswith(UNKNOWN):
            word = message.removeprefix(UNKNOWN).split()[0].partition("=")[0]
            if near := difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.7):
                return f"{message}, did you mean {near[0]}?"
        return f"{message}; see --help"


def seed(text: str) -> int:
    """A seed as a run takes it: a word of 64 bits. For argparse."""
    if not text.isdecimal() or not 0 <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 2^64 - 1")
    return int(text)


def output_file(text: str) -> Path:
    """The path of a file that is going to be written; its directory is made now. For argparse: a mistake costs no work.

    Raises ArgumentTypeError where it is a directory, or cannot be written.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a directory: give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror}): choose another") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written (no permission): choose another")
    return path
