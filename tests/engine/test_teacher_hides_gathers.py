"""The teacher runs first in the one engine, so the student's first weights travel while it computes."""

from __future__ import annotations

import pytest
from torch import nn

from configs.deepspeed import complete_ds_config
from engine.build import build_pretraining
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

CONFIG = tiny_config("system.compile=off")
BLOCK = 20_000  # elements; a block of the tiny trunk has 12,640
FREED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}


def fate(block: nn.Module) -> str:
    """What has become of a block's weights: NOT_AVAILABLE, INFLIGHT or AVAILABLE."""
    return str(next(block.parameters()).ds_status.name)


def looked_at(comm: Comm, prefetch: int) -> list[str]:
    """In the third step, whose order ZeRO-3 knows: the student's first block as the teacher's last begins and ends."""
    zero = {"stage": 3, **FREED, "stage3_prefetch_bucket_size": prefetch}
    parts = build_pretraining(CONFIG, complete_ds_config({"zero_optimization": zero}, CONFIG, comm.world_size), comm)
    model, seen = parts.engine.module, []
    last = model.teacher.trunk.blocks[-1]
    last.register_forward_pre_hook(lambda *_: seen.append(fate(model.trunk.blocks[0])))
    last.register_forward_hook(lambda *_: seen.append(fate(model.trunk.blocks[0])))
    ranks.run_steps(parts, CONFIG, comm, 0, 3)
    return seen[-2:]


@pytest.mark.L1
def test_the_students_first_block_is_sent_for_before_the_teachers_last_begins() -> None:
    for begins, ends in run_ranks(looked_at, 2, BLOCK):
        # AVAILABLE: it came in one message with something that was waited for.
        assert begins in ("INFLIGHT", "AVAILABLE")
        assert ends in ("INFLIGHT", "AVAILABLE")
    behind = run_ranks(looked_at, 2, 0)
    assert behind == [["NOT_AVAILABLE", "NOT_AVAILABLE"]] * 2, "without looking ahead it is asked for when it is needed"
