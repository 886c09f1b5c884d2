"""What autograd keeps of the model's forward, in bytes by component: the real forward, on tensors without memory.

    saved(config, Rows.per_rank(config, world_size=8), batch, "matmul")   # {"trunk": 91234304, "text": 5046272, ...}

The forward runs under torch's FakeTensorMode: shapes, dtypes and aliasing are those of the run, memory is not there, so
a preset that fits no machine here is counted in seconds. Each storage counts once, at the component that keeps it
first; parameters and inputs do not. Without activation checkpointing, without what objectives keep, and as attention
backends behave on the CPU: `sdpa` and `matmul`, of which the latter keeps its matrices of scores.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import Config
from data.batch import Batch
from engine.step import model_inputs
from engine.zero import DTYPES
from model.pretrainer import Pretrainer, Rows


def saved(config: Config, rows: Rows, batch: Batch, attention: str) -> dict[str, int]:
    """Bytes of one forward over `batch`, a rank's own, whose numbers do not matter; "" is between components."""
    inputs = model_inputs(batch, torch.device("cpu"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.optim.precision])
    try:
        with FakeTensorMode() as mode:
            return of_forward(Pretrainer(config, rows, attention), _fake(inputs, mode))
    finally:
        torch.set_default_dtype(default)


def of_forward(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Bytes that `model(**inputs)` leaves for its backward, by the child of `model` that was running."""
    running, found = [""], Counter[str]()
    seen = {_storage(tensor) for tensor in (*model.parameters(), *inputs.values()) if isinstance(tensor, Tensor)}
    kept = []  # or a freed storage's number would be given to the next

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            found[running[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    hooks = []
    for name, part in model.named_children():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(part.register_forward_hook(lambda *_: running.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept.append(model(**inputs))
    for hook in hooks:
        hook.remove()
    return dict(found)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """Every tensor in a dictionary or a named tuple without its memory."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: _fake(part, mode) for key, part in value.items()}
    return type(value)(*(_fake(part, mode) for part in value)) if isinstance(value, tuple) else value
