"""A line on stderr that ends nothing where stderr goes to a full disk, or to a terminal that is gone.

complain("error: rank 0 ends, a rank is lost")
"""

from __future__ import annotations

import sys
from contextlib import suppress


def complain(words: str) -> None:
    """Prints them at once, if that can be. What comes next matters more: an exit code, a restart."""
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)
