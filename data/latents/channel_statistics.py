"""python -m data.latents.channel_statistics DIR...: the channel statistics of latents that came without them.

Stores of ours have theirs from the start. Public latents are often handed out without `latents_stats.pt`, and
LightningDiT writes it when it first reads them, from 10,000 pictures; here it comes from every value, mirrored or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.progress import track
from safetensors import safe_open

from configs import UserError
from configs.command_line import CommandParser
from data.latents.files import (
    FLIPPED,
    LATENTS,
    STATISTICS,
    check_statistics,
    read_shard,
    shard_files,
    write_statistics,
)
from data.latents.writer import Tally

_ROWS = 256  # read at once


def measure(directory: Path) -> None:
    """Writes DIR/latents_stats.pt. Raises UserError where it is there already, or a file is damaged."""
    if (directory / STATISTICS).exists():
        raise UserError(f"{directory / STATISTICS} is there already: remove it first, if it is wrong")
    tally = Tally()
    for path in track(shard_files(directory), "measuring", disable=not sys.stdout.isatty()):
        read_shard(path)  # says what is wrong with it, if anything is
        with safe_open(path, "pt") as stored:
            for key in (LATENTS, FLIPPED):
                if key in stored.keys():  # noqa: SIM118 (not a mapping)
                    for rows in stored.get_tensor(key).split(_ROWS):
                        tally.count(rows)
    mean, std = tally.statistics()
    check_statistics(mean, std, str(directory))
    write_statistics(directory, mean, std)


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = CommandParser(prog="python -m data.latents.channel_statistics", description="Measure public latents.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="directories of *.safetensors")
    try:
        for directory in parser.parse_args(arguments).dirs:
            measure(directory)
            print(f"wrote {directory / STATISTICS}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
