"""Command-line parser of every command, its argument types, and the mode of the files that commands write.

    parser = CommandParser(prog="python -m profiling.plan", description=__doc__)
    parser.add_argument("--json", type=output_file)      # creates the directory of the file, or is an error

No abbreviated options; an error is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

UNRECOGNIZED = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser without abbreviated options, which a new option could make ambiguous; subcommands use it too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Print the error in one line to stderr and exit with code 2."""
        print(f"error: {self.with_remedy(message)}", file=sys.stderr)
        raise SystemExit(2)

    def with_remedy(self, message: str) -> str:
        """Return argparse's message with a remedy: the closest option, or --help."""
        if message.startswith(UNRECOGNIZED):
            word = message.removeprefix(UNRECOGNIZED).split()[0].partition("=")[0]
            if near := difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.7):
                return f"{message}, did you mean {near[0]}?"
        return f"{message}; see --help"


def seed(text: str) -> int:
    """Parse a seed, an unsigned integer of 64 bits (an argparse type)."""
    if not text.isdecimal() or not 0 <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 2^64 - 1")
    return int(text)


def output_file(text: str) -> Path:
    """Parse the path of an output file and create its directory (an argparse type).

    Raises ArgumentTypeError, before any work is done, if it is a directory or cannot be written.
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


def apply_umask(path: Path | str) -> None:
    """Give a file the mode that `open` would have given it: 0600 -> 0644 under the usual umask 022.

    safetensors 0.8 writes files of mode 0600, which nobody else on a shared disk could read.
    """
    mask = os.umask(0)
    os.umask(mask)  # the umask cannot be read without being set
    os.chmod(path, 0o666 & ~mask)
