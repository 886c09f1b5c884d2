"""The engine's promise of one pass: blocks run once a step, the teacher's once more, whatever the ZeRO stage."""

from collections import Counter

import pytest

from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1


def count_block_calls(comm: Comm, steps: int) -> Counter[str]:
    from engine.build import BLOCK_CLASSES

    config = tiny_config()
    parts = ranks.build(config, comm, "zero3")
    calls: Counter[str] = Counter()
    for name, module in parts.engine.module.named_modules():
        if isinstance(module, tuple(BLOCK_CLASSES)):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    ranks.run_steps(parts, config, comm, 0, steps)
    return calls


def test_every_block_runs_exactly_once_a_step() -> None:
    expected = {f"trunk.blocks.{i}": 3 for i in range(2)} | {f"teacher.trunk.blocks.{i}": 3 for i in range(2)}
    expected |= {"decoder.blocks.0": 3, "text.resblocks.0": 3}
    for calls in run_ranks(count_block_calls, 2, 3):
        assert calls == expected
