"""Python's garbage collector, kept out of the steps.

By itself it runs whenever allocations have piled up, on every rank at another moment, and a full pass looks at every
object there is: the rank that collects makes all others wait in the next collective. In the loop it is off; what lives
before the loop is frozen, that is never looked at again; and at reports, on all ranks at the same step, the little that
is new is collected.

    with collected_by_hand():
        for step in ...:
            if is_report: gc.collect()
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Inside, only `gc.collect()` collects, and only what was made inside. Afterwards all is as it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
