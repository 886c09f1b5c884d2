"""DeepSpeed's one door: construction, the ZeRO engine, and a rank's own shard of every parameter.

Under ZeRO-3 a parameter is an empty tensor outside the engine's forward; what a rank owns is a `Fragment`: a contiguous
range of the flattened parameter, readable and writable for the fp32 master weight and for every optimizer moment.
Checkpoints and the EMA teacher read and write fragments alone, so they are the same code for ZeRO-1, 2 and 3 and for
any world size.

    from engine import zero

    with zero.construction(ds_config, "bf16", device, 60):   # ZeRO-3: parameters are partitioned as they are made
        model = Pretrainer(config, rows)
    engine = zero.initialize(model, optimizer, ds_config)
    [f] = [f for f in zero.fragments(engine) if f.name == "trunk.norm.weight"]

All measurements in these files are of deepspeed 0.19.8 (docs/decisions/zero.md).
"""

from engine.zero.build import DTYPES, construction, gathered, initialize, mark_leaves, reduce_once
from engine.zero.optimizer import can_build, deepspeed_adamw, make_moments, skip_steps_where, steps_taken
from engine.zero.param_shards import (
    Fragment,
    drop_gathered,
    fragments,
    full_shape,
    is_partitioned,
    local_range,
    replicated_tensors,
    rounded_copies,
    shard,
    sync_from_masters,
)
from engine.zero.streams import collectives, observe_deepspeed

__all__ = [
    "DTYPES",
    "Fragment",
    "can_build",
    "collectives",
    "construction",
    "deepspeed_adamw",
    "drop_gathered",
    "fragments",
    "full_shape",
    "gathered",
    "initialize",
    "is_partitioned",
    "local_range",
    "make_moments",
    "mark_leaves",
    "observe_deepspeed",
    "reduce_once",
    "replicated_tensors",
    "rounded_copies",
    "shard",
    "skip_steps_where",
    "steps_taken",
    "sync_from_masters",
]
