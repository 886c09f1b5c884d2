"""The optimizer: AdamW in two groups, weight decay on matrices only.

optimizer = adamw(model, config.optim)
set_learning_rate(engine, 1e-4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.schema import Optim
from engine.zero import full_shape


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; its learning rate is set at every step by the schedule."""
    return torch.optim.AdamW(parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with decay; vectors (norms, biases, scales, tokens of one row) without."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = full_shape(parameter)
            is_vector = sum(size > 1 for size in shape) <= 1
            (vectors if is_vector else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, value: float) -> None:
    """The same rate in every group; DeepSpeed hands the groups of the wrapped optimizer through."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value
