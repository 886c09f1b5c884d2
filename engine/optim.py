"""The optimizer: AdamW or LAMB, weight decay on matrices only; and which library computes its step.

    choice = resolve(config, ds_config, device)      # OptimizerChoice("torch_fused", "auto: one pass over ...")
    optimizer = build(model, config.optim, choice.name)
    set_learning_rate(engine, 1e-4)

What a step does (AdamW, or LAMB) is science: optim.kind. Which library does it is system: system.optimizer, and every
AdamW here takes torch's steps to rounding. This file is the one door to NVIDIA's apex, which is built from its source;
the package of that name on PyPI is another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from configs import RunConfig, UserError
from configs.deepspeed import offloads_optimizer
from configs.load import one_line
from configs.run import Optim
from engine import zero

MAX_BUILD_SECONDS = 20 * 60  # seconds; of one of DeepSpeed's optimizers, a minute or two on a quiet machine
APEX_INSTALL = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(compiles, with CUDA's toolkit)"
)


@dataclass(frozen=True)
class OptimizerChoice:
    """Which library computes the step, and why."""

    name: str
    reason: str


def resolve(config: RunConfig, ds_config: dict[str, Any], device: torch.device) -> OptimizerChoice:
    """Return what system.optimizer means for this run. Raises UserError where it is not possible."""
    name, is_lamb = config.system.optimizer, config.optim.kind == "lamb"
    states = torch.device("cpu") if offloads_optimizer(ds_config) else device  # where the step is computed
    if name == "auto":
        if is_lamb:
            name, reason = "apex", "auto: optim.kind=lamb, and only apex has it; its trust ratios are per rank's share"
        else:
            name, reason = "torch_fused", f"auto: one pass over weights, gradients and moments on {states.type}"
    else:
        reason = "named in the config"
    if is_lamb and name != "apex":
        raise UserError(
            f"system.optimizer={name} has no optim.kind=lamb: only apex has; choose apex or optim.kind=adamw"
        )
    if name in ("deepspeed", "apex") and states.type == "cpu" and device.type == "cuda":
        raise UserError(f"system.optimizer={name} steps on the GPU, offload_optimizer keeps its states on the host: "
                        "choose torch_fused or deepspeed_cpu, or another --ds_config")  # fmt: skip
    if name == "deepspeed_cpu" and states.type != "cpu":
        raise UserError("system.optimizer=deepspeed_cpu steps on the host, the states are on the GPU: choose auto, or "
                        "a --ds_config with offload_optimizer (configs/deepspeed/zero3_offload.json)")  # fmt: skip
    return OptimizerChoice(name, reason)


def build(model: nn.Module, optim: Optim, name: str) -> torch.optim.Optimizer:
    """Build AdamW or LAMB over the trainable parameters, by `name` of `resolve`; the schedule sets each step's rate.

    Raises UserError where the library of that name is missing or its kernels do not build.
    """
    groups = parameter_groups(model, optim.weight_decay, one_each=optim.kind == "lamb")
    return _BUILDERS[name](groups, optim)


def parameter_groups(model: nn.Module, weight_decay: float, one_each: bool = False) -> list[dict[str, Any]]:
    """Split into two groups: matrices with decay; vectors (norms, biases, scales, tokens of one row) without.

    ZeRO flattens a group into one tensor; with `one_each` every matrix is a group, so that a norm over it can be taken.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = zero.full_shape(parameter)
            is_vector = sum(size > 1 for size in shape) <= 1
            (vectors if is_vector else matrices).append(parameter)
    parts = [[matrix] for matrix in matrices] if one_each else [matrices]
    groups = [{"params": part, "weight_decay": weight_decay} for part in parts]
    groups.append({"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of every parameter group; DeepSpeed passes the wrapped optimizer's groups through."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def _torch(groups: list[dict[str, Any]], optim: Optim, is_fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=is_fused)


def _deepspeed(groups: list[dict[str, Any]], optim: Optim, kind: str) -> torch.optim.Optimizer:
    _refuse_stale_lock("cpu_adam" if kind == "deepspeed_cpu" else "fused_adam")
    try:
        return zero.deepspeed_adamw(kind, groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    except Exception as error:  # whatever compilers and loaders raise
        cause = error.__cause__ or error
        raise UserError(
            f"system.optimizer={kind}: DeepSpeed compiles it at first use, which failed ({type(cause).__name__}: "
            f"{one_line(cause)}); it wants a C++ compiler and ninja, kernels for a GPU also nvcc "
            "(`ds_report` shows what is missing), or take system.optimizer=torch_fused"
        ) from error


def _refuse_stale_lock(extension: str) -> None:
    """Raise UserError for the lock of a build that was killed: torch would wait for it forever, without a message."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{extension}/lock"):
        age = time.time() - lock.stat().st_mtime
        if age > MAX_BUILD_SECONDS:
            raise UserError(
                f"system.optimizer: {lock} is {age / 60:.0f} minutes old and no build takes {MAX_BUILD_SECONDS // 60}: "
                "one was killed there, and every start would wait for it; remove the file"
            )


def _apex(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "adam_w_mode": True}
    if optim.kind == "lamb":
        # Its own clipping would see a rank's share of the gradient only, and ZeRO has clipped by then.
        options["max_grad_norm"] = float("inf")
    try:
        library = import_module("apex.optimizers")
        kind = library.FusedLAMB if optim.kind == "lamb" else library.FusedAdam
        return _on_filled_groups(kind)(groups, **options)
    except (ImportError, AttributeError, RuntimeError) as error:  # not there, PyPI's, without its extensions
        raise UserError(
            f"system.optimizer=apex: {error}; it needs NVIDIA's apex with its CUDA extensions, and `apex` on PyPI is "
            f"another package: {APEX_INSTALL}; or take system.optimizer=torch_fused"
        ) from error


def _on_filled_groups(kind: type[Any]) -> type[Any]:
    """Make an optimizer class of apex work under ZeRO-3.

    apex looks at the first parameter of every group and counts steps by group. ZeRO-3 calls `step` once for every flat
    tensor, all other groups being empty then: so only filled groups are shown, and steps counted by tensor.
    """

    class OnFilledGroups(kind):
        param_groups: list[dict[str, Any]]

        def step(self, closure: Any = None) -> Any:
            every = self.param_groups
            self.param_groups = [group for group in every if group["params"]]
            flats = [group["params"][0] for group in self.param_groups]
            for group, flat in zip(self.param_groups, flats, strict=True):
                group["step"] = self.state[flat]["step"] if flat in self.state else 0
            try:
                return super().step(closure)
            finally:
                for group, flat in zip(self.param_groups, flats, strict=True):
                    self.state[flat]["step"] = group.pop("step")
                self.param_groups = every

    return OnFilledGroups


_BUILDERS: dict[str, Callable[[list[dict[str, Any]], Optim], torch.optim.Optimizer]] = {
    "torch": lambda groups, optim: _torch(groups, optim, is_fused=False),
    "torch_fused": lambda groups, optim: _torch(groups, optim, is_fused=True),
    "deepspeed": lambda groups, optim: _deepspeed(groups, optim, "deepspeed"),
    "deepspeed_cpu": lambda groups, optim: _deepspeed(groups, optim, "deepspeed_cpu"),
    "apex": _apex,
}
