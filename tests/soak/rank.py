"""A rank of a soak: the engine, reading its shards from storage that fails now and then.

    deepspeed --num_accelerators 2 tests/soak/rank.py engine/launch.py --config ...

Every request has a chance of failing or of giving half of its bytes, and takes longer at random: all of it the loader
has to get over without a sample lost.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.data.faulty_storage import Schedule, faults  # noqa: E402

ERRORS, CUTS, LATENCY_SECONDS = 0.001, 0.001, 0.0005


def main(arguments: list[str]) -> int:
    """One rank; its exit code."""
    from engine import launch

    own = [word for word in arguments if Path(word).name != "launch.py"]
    seed = int(os.environ.get("VTP_SOAK_SEED", 0)) + int(os.environ.get("RANK", 0))
    with faults(Schedule(seed, LATENCY_SECONDS, ERRORS, CUTS)):
        return launch.main(own)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
