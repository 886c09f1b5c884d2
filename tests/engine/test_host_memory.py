"""A freed block is kept, and asked for again without a page fault; what the user set is left alone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch

from engine.host_memory import keep_freed_blocks

pytestmark = pytest.mark.L0
PROGRAM = """
import resource, sys, torch
from engine.host_memory import keep_freed_blocks
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
