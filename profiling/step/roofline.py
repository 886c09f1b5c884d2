"""What operators compute and move, and how much of it a machine can do at most: the two axes of a roofline.

    counted = Counted()
    with counted, counted("trunk"):
        x @ w                              # (4, 8) @ (8, 2), float32
    counted.work["trunk"]                  # Work(flops=128, product_bytes=224, bytes=224)
    roof = Roof(flops_per_second=1.0e11, bytes_per_second=1.4e10)
    roof.at(0.57)                          # 8.0e9: FLOP/s that nothing with so few FLOPs a byte can exceed

    flops           of products of matrices and convolutions, by the rules of profiling/flops.py
    product_bytes   operands and results of these products, each once: what is left when all between them is fused
    bytes           operands and results of every operator that is no view: what eager steps ask of caches and memory

Works on tensors without memory as well; what a step's phases do is profiling/step/phase_work.py's matter.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BETWEEN = "other"  # what runs in no phase: crops are normalised, rows are picked
_MOVES_NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
_READS_WHAT_IT_GIVES = ("embedding", "index_select", "index", "gather")  # a few rows of a table, not the table


@dataclass(frozen=True)
class Work:
    """Of one rank in one step."""

    flops: float = 0
    product_bytes: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.product_bytes + other.product_bytes, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.flops, factor * self.product_bytes, factor * self.bytes)

    def intensity(self, is_fused: bool) -> float:
        """FLOPs a byte moved: with all fused between the products, or with nothing fused."""
        moved = self.product_bytes if is_fused else self.bytes
        return self.flops / moved if moved else math.inf


@dataclass(frozen=True)
class Roof:
    """The most a machine does: its peak, or what its memory can feed."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on the peak, not the memory, is the limit."""
        return self.flops_per_second / self.bytes_per_second

    def at(self, intensity: float) -> float:
        """FLOP/s."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def seconds(self, work: Work, is_fused: bool) -> float:
        """The least that it can take."""
        moved = work.product_bytes if is_fused else work.bytes
        return max(work.flops / self.flops_per_second, moved / self.bytes_per_second)


class Counted(TorchDispatchMode):
    """Adds up every operator's work, by the innermost phase it runs in; and once more, under `within`, by the file
    whose code asked for it, for the files in `named`."""

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        """`named`: the end of a file's path without .py -> what to call it."""
        super().__init__()
        self.work: defaultdict[str, Work] = defaultdict(Work)
        self.within: defaultdict[str, Work] = defaultdict(Work)
        self._running, self._named = [BETWEEN], named or {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.begin(phase)
        try:
            yield
        finally:
            self.end()

    def begin(self, phase: str) -> None:
        """Enters the phase; `end` leaves it. Phases nest."""
        self._running.append(phase)

    def end(self, *_: Any) -> None:
        """Leaves the phase that was entered last. Arguments, those of a forward hook, are not read."""
        self._running.pop()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        work = work_of(operator, arguments, options or {}, result)
        self.work[self._running[-1]] += work
        if work.bytes and (name := self._asker()):
            self.within[name] += work
        return result

    def _asker(self) -> str | None:
        frame = sys._getframe(2) if self._named else None
        while frame is not None:
            path = frame.f_code.co_filename.removesuffix(".py")
            for end, name in self._named.items():
                if path.endswith(end):
                    return name
            frame = frame.f_back
        return None


def work_of(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> Work:
    """One operator's, with tensors or without memory behind them."""
    name = operator._schema.name.removeprefix("aten::")
    read_options = {key: value for key, value in options.items() if key != "out"}
    given = [leaf for leaf in tree_leaves((arguments, read_options)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if name in _MOVES_NOTHING or _is_view(operator, given, made):
        return Work()
    written = sum(map(_nbytes, made))
    read = sum(map(_nbytes, given[1:] if name in _READS_WHAT_IT_GIVES else given))
    moved = read + written * (2 if name in _READS_WHAT_IT_GIVES else 1)
    count = _FLOPS.get(operator._overloadpacket)
    flops = count(*arguments, **options, out_val=result) if count else 0
    return Work(flops, moved if flops else 0, moved)


def _is_view(operator: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if operator._schema.is_mutable or not made:
        return not made
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _nbytes(tensor: Tensor) -> int:
    """Of an expanded tensor what is there, not what it looks like."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _addmm_in_place(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _attended(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """(B, H, N, E) against (B, H, N, E): two products."""
    return 4 * query.numel() * key.shape[-2]


def _attended_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any, **___: Any) -> int:
    return 2 * _attended(query, key)


_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    _ATEN.addmm_: _addmm_in_place,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attended,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attended_backward,
}
