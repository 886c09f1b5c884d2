"""Peak memory is what was held at once, not what was allocated in all."""

from __future__ import annotations

import pytest
import torch

from profiling.instruments.memory import peak_bytes, process_peak_bytes

pytestmark = [pytest.mark.L0, pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's counter")]
MIB = 2**20


def of_mib(size: int) -> torch.Tensor:
    return torch.zeros(size * MIB, dtype=torch.uint8)


def test_the_peak_is_what_is_held_at_once() -> None:
    before = of_mib(8)  # held before: does not count

    def call() -> torch.Tensor:
        first = of_mib(4)
        second = of_mib(2)
        del first
        third = of_mib(3)
        return second[0] + third[0] + before[0]

    assert peak_bytes(call) == pytest.approx(6 * MIB, abs=4096)


def test_what_only_the_backward_holds_counts() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB
    assert peak_bytes(lambda: x.exp().sum()) == pytest.approx(MIB, abs=4096)
    assert peak_bytes(lambda: x.exp().sum().backward()) >= 2 * MIB


def test_the_process_remembers_its_peak_after_the_memory_is_gone() -> None:
    before = process_peak_bytes()
    big = of_mib(256).fill_(1)
    del big
    assert process_peak_bytes() >= max(before, 256 * MIB)
