"""DeepSpeed's one door: construction, the ZeRO engine, and a rank's own share of every parameter.

Under ZeRO-3 a parameter is an empty tensor outside the engine's forward; what a rank owns is a `Fragment`: a contiguous
range of the flattened parameter, readable and writable for the fp32 master weight and for every optimizer moment.
Checkpoints and the EMA teacher speak of fragments alone, so they are the same code for ZeRO-1, 2 and 3 and for any
world size.

    with construction(ds_config, "bf16"):        # ZeRO-3: parameters are born partitioned
        model = Pretrainer(config, rows)
    engine = start(model, optimizer, ds_config)
    [f] = [f for f in fragments(engine) if f.name == "trunk.norm.weight"]
    f.start, f.numel                             # rank 1 of 2 of a 384-vector: (192, 192)
    f.read("exp_avg")                            # (192,) float32

Facts this file rests on, measured with deepspeed 0.19.8 (docs/decisions.md has the story of each):
`zero.Init` must not replace `F.linear` (it does by default, for the life of the process); optimizer moments do not
exist before the first step; a persistent parameter keeps its gathered copy, so writing its shard alone changes nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from configs.ds import zero_stage
from engine import world
from engine.pieces import MASTER, MOMENTS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@contextmanager
def construction(ds_config: dict[str, Any], precision: str, device: torch.device) -> Iterator[None]:
    """Parameters made inside have the run's dtype and device; with ZeRO-3 they are partitioned as they are made.

    torch.distributed must be up.
    """
    _prepare()
    deepspeed.init_distributed(dist_init_required=False)  # takes over the group engine.world formed
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(DTYPES[precision])
        stack.enter_context(device)
        if zero_stage(ds_config) == 3:
            # No tensor_overrides: a buffer keeps the dtype it asks for. No mem_efficient_linear: F.linear stays.
            stack.enter_context(
                deepspeed.zero.Init(config_dict_or_path=ds_config, mem_efficient_linear=False, tensor_overrides=[])
            )
        yield


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Inside, the parameters are whole. With `write`, what rank 0 leaves in them is scattered to all at the end."""
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def mark_leaves(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """ZeRO-3 gathers a module of these kinds as a whole, before its forward: inside it there are no hooks, so one
    compiled graph can cover it. Raises if the model has no such module."""
    set_z3_leaf_modules(model, kinds)


def start(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around the model that was built inside `construction`."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        _skip_on_device(engine.optimizer, optimizer)
    return engine


def own_adamw(kind: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW over the parameter groups: "deepspeed" where the states are on the run's device,
    "deepspeed_cpu" where they are on the host. Raises what a compiler raises: the first use builds a C++ extension."""
    if kind == "deepspeed":
        return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **options)
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)


def can_build(operator: str) -> bool:
    """Whether DeepSpeed holds one of its C++ operators ("cpu_adam", "fused_adam") to be possible on this machine."""
    return bool(deepspeed.ops.__compatible_ops__.get(operator, False))


def one_reduction(engine: Any, num_backwards: int) -> AbstractContextManager[None]:
    """Inside, `num_backwards` calls of engine.backward leave their gradients where they are; they are summed and
    reduced over ranks once, at the end. A single backward is left alone: then ZeRO reduces while it computes.

    The price is a whole gradient in the model's dtype on every rank until the end, whatever the stage.
    """
    return nullcontext() if num_backwards == 1 else engine.coalesce_grad_reduction()


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


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, whether it is partitioned at the moment or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@dataclass(frozen=True)
class Fragment:
    """This rank's range [start, start + numel) of one flattened trainable parameter."""

    name: str
    parameter: nn.Parameter
    start: int
    numel: int

    def read(self, key: str) -> Tensor:
        """(numel,) float32: the master weight (key "fp32") or a moment. Copy or view: `write` changes it."""
        if is_partitioned(self.parameter):
            whole = (
                safe_get_local_fp32_param(self.parameter)
                if key == MASTER
                else safe_get_local_optimizer_state(self.parameter, key)
            )
            return whole.detach()[: self.numel]  # the last rank's shard is padded
        mapping = self.parameter._hp_mapping  # type: ignore[attr-defined]
        return mapping.get_hp_fragment(None if key == MASTER else key).detach()

    def write(self, key: str, value: Tensor) -> None:
        """Sets it to `value` (numel,). When all are written, `publish` brings the model's own copies along."""
        if not is_partitioned(self.parameter):
            self.read(key).copy_(value)
            return
        padded = _padded(value, shard(self.parameter))
        if key == MASTER:
            safe_set_local_fp32_param(self.parameter, padded)
            shard(self.parameter).copy_(padded)
        else:
            safe_set_local_optimizer_state(self.parameter, padded, key)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of all trainable parameters, in the model's order. A rank may own none of a parameter."""
    _link_moments(engine.optimizer)
    found = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        start, numel = local_range(parameter)
        if numel:
            found.append(Fragment(name, parameter, start, numel))
    return found


def local_range(parameter: nn.Parameter) -> tuple[int, int]:
    """(start, numel) of what this rank owns of the flattened parameter; padding is not counted.

    ZeRO-3 cuts every parameter evenly; ZeRO-1 and 2 cut the concatenation of all of them, and leave a frozen parameter
    whole on every rank.
    """
    if is_partitioned(parameter):
        size = shard(parameter).numel()
        start = min(size * world.rank(), parameter.ds_numel)  # type: ignore[attr-defined]
        return start, min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if not parameter.requires_grad:
        return 0, parameter.numel()
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(parameter, "ds_tensor")


def shard(parameter: nn.Parameter) -> Tensor:
    """The live flat shard of a ZeRO-3 parameter in the model's dtype, padded; else the whole flat parameter."""
    return parameter.ds_tensor.data if is_partitioned(parameter) else parameter.data.view(-1)  # type: ignore[attr-defined]


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Drops the gathered copies of persistent parameters whose shards were written; the next forward gathers anew."""
    for parameter in parameters:
        if is_partitioned(parameter) and parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]


def publish(engine: Any) -> None:
    """After fragments were written: every gathered or replicated copy of a weight is made to agree with its master.

    ZeRO-1 and 2 keep the whole model on every rank, so the ranges other ranks wrote have to come over.
    """
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    release(parameters)
    for parameter in parameters:
        if not is_partitioned(parameter):
            parameter.data.copy_(safe_get_full_fp32_param(parameter))


def make_moments(engine: Any, steps_taken: int) -> None:
    """Creates the AdamW state a resumed run writes into, as if `steps_taken` steps had been taken with zero moments."""
    zero = engine.optimizer
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in zero.fp32_partitioned_groups_flat if is_stage_3 else zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": _step_count(zero.optimizer, flat, steps_taken), **moments}


def steps_taken(engine: Any) -> int:
    """Optimizer steps actually taken: skipped ones (non-finite gradients in bf16) do not count."""
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _prepare() -> None:
    """Keeps DeepSpeed's start-up talk off the terminal, with two warnings that are known here and harmless, and spares
    its CPU build of a shared-memory collective, which serves inference only: a minute of C++ at the first start, and
    a lock file that hangs every later one if that start is killed.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # 0.19 on torch 2.13
    logger.setLevel(logging.WARNING)
    # The Pretrainer returns a dataclass, which hooks cannot look into; it owns no parameter that a hook would gather.
    logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())


def _skip_on_device(zero: Any, optimizer: torch.optim.AdamW) -> None:
    """DeepSpeed asks the host in every step whether the gradient's norm is finite, and so waits for the device. torch's
    fused step can be told by a flag on the device instead: it then changes neither weights nor moments nor its count.
    """

    def flag(norm: Tensor | float) -> bool:
        norm = torch.as_tensor(norm)  # a number where the states are on the host
        optimizer.found_inf = (~torch.isfinite(norm) | (norm < 0)).float()  # type: ignore[attr-defined]
        return False

    def step(closure: Any = None) -> Any:
        with ExitStack() as stack:
            for module in (stage3, stage_1_and_2):
                stack.callback(setattr, module, "is_invalid_grad_norm", module.is_invalid_grad_norm)
                module.is_invalid_grad_norm = flag
            return taken(closure)

    taken, zero.step = zero.step, step
    zero.check_grad_overflow = False  # ZeRO-1 and 2 ask a second time, of the gradients themselves


def _step_count(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> int | Tensor:
    """The count as the optimizer keeps it: torch in a tensor, fused beside the weights; others in an integer."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=flat.device if optimizer.defaults["fused"] else "cpu")


def _link_moments(zero: Any) -> None:
    """ZeRO-1 and 2 link fragments to moments once, after the first group's step; other groups stay without (0.19.8).
    Linked again when every group has its moments."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = not zero.optimizer.state
        zero._lazy_init_hp_params_optimizer_state()


def _padded(value: Tensor, like: Tensor) -> Tensor:
    padded = torch.zeros(like.numel(), dtype=value.dtype, device=like.device)
    padded[: value.numel()].copy_(value)
    return padded
