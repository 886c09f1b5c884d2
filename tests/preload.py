"""What every rank of a test needs, imported once: tests/harness.py forks its ranks from a process that imported this.

The first engine of a process imports torch's compiler, for the optimizer's constructor and for DeepSpeed's Muon, which
it looks at whatever the optimizer is: 1600 modules, most of the time of a short run.
"""

import gc
import importlib

FOR_ENGINES = (
    "torch.distributed",
    "engine.build",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
    "deepspeed.ops.op_builder.all_ops",
    "torch.utils.cpp_extension",
)
for _name in FOR_ENGINES:
    importlib.import_module(_name)
gc.freeze()  # a rank collects its own garbage, and leaves these pages shared
