"""DeepSpeed's one door: construction, the ZeRO engine, and a rank's own share of every parameter.

Under ZeRO-3 a parameter is an empty tensor outside the engine's forward; what a rank owns is a `Fragment`: a contiguous
range of the flattened parameter, readable and writable for the fp32 master weight and for every optimizer moment.
Checkpoints and the EMA teacher speak of fragments alone, so they are the same code for ZeRO-1, 2 and 3 and for any
world size.

    from engine import zero

    with zero.construction(ds_config, "bf16", device, 60):   # ZeRO-3: parameters are born partitioned
        model = Pretrainer(config, rows)
    engine = zero.start(model, optimizer, ds_config, is_left_out=judge)
    [f] = [f for f in zero.fragments(engine) if f.name == "trunk.norm.weight"]

What each file says it measured was measured with deepspeed 0.19.8; docs/decisions/zero.md has the story.
"""

from engine.zero.build import DTYPES, construction, gathered, mark_leaves, one_reduction, start
from engine.zero.exchange import collectives, observed
from engine.zero.optimizer import can_build, make_moments, own_adamw, steps_taken
from engine.zero.shares import (
    Fragment,
    copies,
    fragments,
    full_shape,
    is_partitioned,
    local_range,
    publish,
    release,
    replicas,
    shard,
)

__all__ = [
    "DTYPES",
    "Fragment",
    "can_build",
    "collectives",
    "construction",
    "copies",
    "fragments",
    "full_shape",
    "gathered",
    "is_partitioned",
    "local_range",
    "make_moments",
    "mark_leaves",
    "observed",
    "one_reduction",
    "own_adamw",
    "publish",
    "release",
    "replicas",
    "shard",
    "start",
    "steps_taken",
]
