"""Build a DeepSpeed engine: parameters partitioned as they are made, gathered for a moment, handed over.

    with construction(ds_config, "bf16", device, 60):    # ZeRO-3: a rank holds 1/world_size of each from the start
        model = Pretrainer(config, rows)
    engine = initialize(model, optimizer, ds_config)

Measured with deepspeed 0.19.8: `zero.Init` must not replace `F.linear`, which it does by default, for the life of the
process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, logger, set_z3_leaf_modules
from torch import nn

from configs import UserError
from configs.deepspeed import QUANTIZED_GRADIENTS, QUANTIZED_WEIGHTS, is_enabled, uses_deepcompile, zero_stage
from engine import distributed
from engine.zero.int8_weights import install_quantizer
from engine.zero.streams import let_host_run_ahead

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@contextmanager
def construction(
    ds_config: dict[str, Any], precision: str, device: torch.device, timeout_minutes: float
) -> Iterator[None]:
    """Make parameters inside the `with` in the run's dtype and on its device; with ZeRO-3, partition them at once.

    `timeout_minutes` is that of every group of ranks that DeepSpeed makes, then or later.

    torch.distributed must be up. Raises UserError where the DeepSpeed JSON needs another device.
    """
    _require_device(ds_config, device)
    _quiet_start()
    if is_enabled(ds_config["zero_optimization"], QUANTIZED_WEIGHTS):
        install_quantizer()
    deepspeed.init_distributed(dist_init_required=False)  # takes over the group of engine.distributed
    _set_group_timeout(timeout_minutes)
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(DTYPES[precision])
        stack.enter_context(device)
        if zero_stage(ds_config) == 3:
            # No tensor_overrides: a buffer keeps the dtype it asks for. No mem_efficient_linear: F.linear stays.
            stack.enter_context(
                deepspeed.zero.Init(
                    config_dict_or_path=ds_config,
                    mem_efficient_linear=False,
                    tensor_overrides=[],
                    # A process's second engine finds the groups of the first; DeepSpeed would fail to make them again.
                    zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
                )
            )
        yield


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Gather parameters inside the `with`. With `write`, what rank 0 leaves in them is scattered to all at the end."""
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def mark_leaves(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """Let ZeRO-3 gather each module of these classes as a whole, before its forward.

    Inside it there are no hooks, so one compiled graph can cover it. Raises if the model has no such module.
    """
    if kinds:
        set_z3_leaf_modules(model, kinds)


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: dict[str, Any],
) -> Any:
    """Return a DeepSpeed engine around the model that was built inside `construction`."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if uses_deepcompile(ds_config):
        engine.compile()  # whose graph has streams and waits of its own
    else:
        let_host_run_ahead(engine)
    return engine


def reduce_once(engine: Any, num_backwards: int) -> AbstractContextManager[None]:
    """Reduce the gradients of `num_backwards` calls of engine.backward once, at the end of the `with`.

    Until then they are summed where they are. A single backward is left alone: then ZeRO reduces while it computes.

    The price is a whole gradient in the model's dtype on every rank until the end, whatever the stage.
    """
    return nullcontext() if num_backwards == 1 else engine.coalesce_grad_reduction()


def _require_device(ds_config: dict[str, Any], device: torch.device) -> None:
    if device.type == "cuda":
        return
    if is_enabled(ds_config["zero_optimization"], QUANTIZED_GRADIENTS):
        raise UserError(
            f"zero_optimization.{QUANTIZED_GRADIENTS}=true on {device.type}: DeepSpeed reduces int4 gradients by CUDA "
            "kernels alone; remove it from --ds_config, or run on GPUs"
        )
    if uses_deepcompile(ds_config):
        raise UserError(
            f"compile.deepcompile=true on {device.type}: DeepCompile's collectives are a CUDA extension; remove it "
            "from --ds_config, or run on GPUs"
        )


def _set_group_timeout(minutes: float) -> None:
    """Set the timeout of the process groups that DeepSpeed makes, even for all ranks again.

    It makes them without one, so they would have torch's, 10 minutes over NCCL and 30 over gloo, whatever that of the
    group it took over is.
    """
    deepspeed.comm.comm.cdb.new_group = partial(distributed.make_group, timeout_minutes=minutes)


def _quiet_start() -> None:
    """Silence DeepSpeed's start messages and two harmless warnings; skip a C++ build that training never uses.

    The build is that of a shared-memory collective on the CPU, for inference: a minute at the first start, and a lock
    file that hangs every later one if that start is killed.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # 0.19 on torch 2.13
    logger.setLevel(logging.WARNING)
    # The Pretrainer returns a dataclass, which hooks cannot look into; it owns no parameter that a hook would gather.
    logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
