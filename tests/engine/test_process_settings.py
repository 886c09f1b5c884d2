"""Garbage is collected by hand in the loop alone; malloc keeps the blocks of a step, unless the user has set it."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch

from engine.process_settings import keep_freed_blocks, manual_garbage_collection

pytestmark = pytest.mark.L0


class Knot:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _collector_as_found() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_inside_nothing_is_collected_but_by_hand_and_only_what_is_new() -> None:
    old = Knot()
    with manual_garbage_collection():
        assert not gc.isenabled()
        was_there, made_inside = weakref.ref(old), weakref.ref(Knot())
        del old
        assert made_inside() is not None
        gc.collect()
        assert made_inside() is None
        assert was_there() is not None, "what lived before the loop is frozen"
    gc.collect()
    assert was_there() is None, "and thawed after it"


def test_the_collector_is_restored_also_after_an_error() -> None:
    with pytest.raises(KeyError), manual_garbage_collection():
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with manual_garbage_collection():
        pass
    assert not gc.isenabled()


PROGRAM = """
import resource, sys, torch
from engine.process_settings import keep_freed_blocks
if sys.argv[1] == "kept":
    print(keep_freed_blocks(torch.device("cpu")))
def touch():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
for _ in range(30):  # the heap needs some to find its shape
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.splitlines()


def test_the_blocks_of_a_step_are_not_faulted_in_again() -> None:
    pages = (64 << 20) // resource.getpagesize()
    said, count = faults("kept")
    if said.startswith("as found (this C library"):
        pytest.skip(said)
    assert said.startswith("freed blocks are kept")
    assert int(count) < pages / 10
    assert int(faults("as found")[0]) > 5 * pages  # the ten blocks, anew; huge pages would make it fewer


def test_what_the_environment_says_of_malloc_stays() -> None:
    said, _ = faults("kept", MALLOC_MMAP_THRESHOLD_="1048576")
    assert said == "as found (MALLOC_MMAP_THRESHOLD_ is set)"


def test_on_a_gpu_nothing_is_set() -> None:
    assert keep_freed_blocks(torch.device("cuda")) == "as found (steps run on the GPU)"
