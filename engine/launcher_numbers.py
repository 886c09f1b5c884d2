"""The numbers that a launcher gives every rank in the environment. Imports no torch: a start reads them first.

launcher_numbers()      # {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8}; of one rank alone where there is no launcher
"""

from __future__ import annotations

import os

from configs import UserError

ALONE = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


def launcher_numbers() -> dict[str, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE.

    Raises UserError where one is set to something else than a number, or to a rank that the world does not have.
    """
    given = {name: os.environ[name] for name in ALONE if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(
                f"{name}={value!r} in the environment is not a number: a launcher sets it for every rank; start the "
                f"run with one, or `unset {' '.join(given)}` to run alone"
            )
    found = ALONE | {name: int(value) for name, value in given.items()}
    has_no_place = {"RANK", "WORLD_SIZE"} <= given.keys() and found["RANK"] >= found["WORLD_SIZE"]
    if has_no_place or found["WORLD_SIZE"] < 1:
        raise UserError(
            f"RANK={found['RANK']} and WORLD_SIZE={found['WORLD_SIZE']} in the environment: ranks are counted from 0 "
            "to WORLD_SIZE - 1; start the run with a launcher, which sets both, or unset both to run alone"
        )
    return found
