"""Where a step meets the other ranks inside DeepSpeed, for what times it and what counts bytes.

for kind, owner, method in collectives(engine):
    phases.wrap(kind, owner, method)         # engine/report/timing.py
with observed(note):                         # engine/report/traffic.py
    engine.backward(loss)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime.zero import stage3

from engine import world


def collectives(engine: Any) -> list[tuple[str, Any, str]]:
    """(kind, owner, method) of the calls in which a step of this engine waits for other ranks.

    The methods are called from the stream that computes. `fetch_sub_module` makes it wait for gathers that run on
    another; the epilogue waits for the reductions that backward has not hidden.
    """
    optimizer = engine.optimizer
    found = [("reduce_scatter", optimizer, "independent_gradient_partition_epilogue")]
    if not isinstance(optimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        return [
            *found,
            ("reduce_scatter", optimizer, "reduce_ipg_grads"),
            ("all_reduce", optimizer, "scaled_global_norm"),
        ]
    return [
        *found,
        ("reduce_scatter", optimizer, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"),
        ("all_reduce", optimizer, "_get_norm_groups"),
        ("all_gather", optimizer.parameter_offload.get_param_coordinator(), "fetch_sub_module"),
        ("all_gather", optimizer, "_post_step"),  # of the parameters that stay gathered
    ]


@contextmanager
def observed(note: world.Note) -> Iterator[None]:
    """Inside, DeepSpeed's gathers and reduce-scatters are told to `note` (world.observed has its other collectives).

    DeepSpeed's backend holds these two functions by itself; torch's module no longer matters to it.
    """
    backend = deepspeed.comm.comm.cdb
    with ExitStack() as stack:
        for kind in ("all_gather", "reduce_scatter"):
            name = f"{kind}_function"
            stack.callback(setattr, backend, name, getattr(backend, name))
            setattr(backend, name, world.told(getattr(backend, name), kind, note))
        yield
