"""What stands between ZeRO and the optimizer it wraps: DeepSpeed's own AdamW, steps left out, the moments, their count.

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

from engine.checkpoint.pieces import MOMENTS


def own_adamw(kind: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW over the parameter groups: "deepspeed" where the states are on the run's device,
    "deepspeed_cpu" where they are on the host. Raises what a compiler raises: the first use builds a C++ extension."""
    if kind == "deepspeed":
        return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **options)
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)


def can_build(operator: str) -> bool:
    """Whether DeepSpeed holds one of its C++ operators ("cpu_adam", "fused_adam") to be possible on this machine."""
    return bool(deepspeed.ops.__compatible_ops__.get(operator, False))


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


def gate(zero: Any, optimizer: torch.optim.Optimizer, is_left_out: Callable[[Tensor], Tensor]) -> None:
    """From now on `is_left_out` (scalar norm of the whole gradient -> scalar bool; called once a step, on every rank)
    decides whether a step is taken: if not, weights, moments and their count stay as they are.

    DeepSpeed 0.19.8 leaves steps out by itself: under ZeRO-3 by the norm alone; under ZeRO-1 and 2 by the norm, and in
    bf16 first by a look at the gradients. Each time it asks the host, and so waits for the device. torch's fused step
    can be told by a flag on the device instead, and nothing waits. Other optimizers keep that one wait.
    """
    is_on_device = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    decided: list[Tensor] = []  # of this step; ZeRO-1 and 2 ask again for every group

    def ask(norm: Tensor | float) -> bool:
        if not decided:
            decided.append(is_left_out(torch.as_tensor(norm)))  # a number where the states are on the host
        if is_on_device:
            optimizer.found_inf = decided[0].float()  # type: ignore[attr-defined]
            return False
        return bool(decided[0])

    def step(closure: Any = None) -> Any:
        decided.clear()
        with ExitStack() as stack:
            for module in (stage3, stage_1_and_2):
                stack.callback(setattr, module, "is_invalid_grad_norm", module.is_invalid_grad_norm)
                module.is_invalid_grad_norm = ask
            result = taken(closure)
        if not decided:  # the look at the gradients was enough, and no norm was taken
            ask(math.inf)
        return result

    taken, zero.step = zero.step, step
    if is_on_device:
        zero.check_grad_overflow = False  # the look at the gradients; the norm says as much


def link_moments(zero: Any) -> None:
    """ZeRO-1 and 2 link fragments to moments once, after the first group's step; other groups stay without (0.19.8).
    Linked again when every group has its moments."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = not zero.optimizer.state
        zero._lazy_init_hp_params_optimizer_state()


def _step_count(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> int | Tensor:
    """The count as the optimizer keeps it: torch in a tensor, fused beside the weights; others in an integer."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=flat.device if optimizer.defaults["fused"] else "cpu")
