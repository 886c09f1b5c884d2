"""The optimizer inside ZeRO: DeepSpeed's own AdamW, skipped steps, the moments and their step count.

    skip_steps_where(guard, engine, optimizer)   # guard(norm) -> bool on the device
    make_moments(engine, steps_taken=500)        # a resumed run: states to write into before the first step
    steps_taken(engine)                          # 500

Measured with deepspeed 0.19.8: optimizer moments do not exist before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor

from engine.checkpoint.tensor_ranges import MOMENTS


def deepspeed_adamw(kind: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW: `kind` "deepspeed" steps on the run's device, "deepspeed_cpu" on the host.

    Raises what a compiler raises: the first use builds a C++ extension.
    """
    if kind == "deepspeed":
        return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **options)
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)


def can_build(operator: str) -> bool:
    """Whether this machine can build DeepSpeed's C++ operator ("cpu_adam", "fused_adam"), as DeepSpeed detects it."""
    return bool(deepspeed.ops.__compatible_ops__.get(operator, False))


def make_moments(engine: Any, steps_taken: int) -> None:
    """Create the AdamW state that a resumed run loads into: zero moments after `steps_taken` steps."""
    zero = engine.optimizer
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in zero.fp32_partitioned_groups_flat if is_stage_3 else zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": _step_count(zero.optimizer, flat, steps_taken), **moments}


def steps_taken(engine: Any) -> int:
    """Return the optimizer steps actually taken: skipped ones do not count."""
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def skip_steps_where(is_skipped: Callable[[Tensor], Tensor], engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let `is_skipped` decide, from now on, which optimizer steps are taken.

    It maps the scalar norm of the whole gradient to a scalar bool, and is called once a step on every rank. A skipped
    step leaves weights, moments and their step count as they are.

    DeepSpeed 0.19.8 skips steps by a rule of its own: under ZeRO-3 by the norm alone; under ZeRO-1 and 2 by the norm,
    and in bf16 first by a look at the gradients. Each time it asks the host, and so waits for the device. torch's fused
    step takes a flag on the device instead, and nothing waits. Other optimizers keep that one wait.
    """
    zero = engine.optimizer
    is_on_device = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    decision: list[Tensor] = []  # of this step; ZeRO-1 and 2 ask again for every group

    def ask(norm: Tensor | float) -> bool:
        if not decision:
            decision.append(is_skipped(torch.as_tensor(norm)))  # a number where the states are on the host
        if is_on_device:
            optimizer.found_inf = decision[0].float()  # type: ignore[attr-defined]
            return False
        return bool(decision[0])

    def step(closure: Any = None) -> Any:
        decision.clear()
        with ExitStack() as stack:
            for module in (stage3, stage_1_and_2):
                stack.callback(setattr, module, "is_invalid_grad_norm", module.is_invalid_grad_norm)
                module.is_invalid_grad_norm = ask
            result = plain_step(closure)
        if not decision:  # the look at the gradients was enough, and no norm was computed
            ask(math.inf)
        return result

    plain_step, zero.step = zero.step, step
    if is_on_device:
        zero.check_grad_overflow = False  # the look at the gradients; the norm says as much


def link_moments(zero: Any) -> None:
    """Link ZeRO-1 and 2's fragments to their moments, once every group has them.

    DeepSpeed 0.19.8 links once, after the first group's step, and leaves the other groups without.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = not zero.optimizer.state
        zero._lazy_init_hp_params_optimizer_state()


def _step_count(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> int | Tensor:
    """Return the step count as the optimizer keeps it: torch a tensor, fused beside the weights; others an integer."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=flat.device if optimizer.defaults["fused"] else "cpu")
