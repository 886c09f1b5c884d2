"""Record operators while they run: storages allocated and freed, and the bytes of operands and results.

    trace = OperatorTrace(with_traffic=True)
    with trace.phase("forward"):
        y = (x @ w).relu()
    trace.events        # [TraceEvent("forward", moved=8192, product=8192), TraceEvent("forward", 4096), ...]
    peak(trace.events)  # bytes

Works on real tensors and, under torch's FakeTensorMode, on tensors without memory, with the same result. What a kernel
allocates within itself is not seen, nor is an allocator's rounding.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OTHER = "other"  # the phase of what runs in none
# Loss functions that keep no matrix of their logits, by the file whose code asks for the products.
LOGITS = {
    "kernels/contrastive": "contrastive logits",
    "kernels/prototypes": "prototype logits",
}


class TraceEvent(NamedTuple):
    """A storage was allocated or freed, an operator moved bytes, a gradient was complete, or a block began."""

    phase: str  # of an allocated or freed storage: the one that allocated it
    delta: int = 0  # bytes allocated, negative where freed
    moved: int = 0  # bytes of an operator's operands and results
    product: int = 0  # of these, those of a matrix product or convolution
    source: str | None = None  # one of the values of LOGITS, whose code ran the operator
    gradient: int = 0  # elements of the parameter whose gradient is complete
    block: tuple[str, str, int] | None = None  # ("forward" or "backward", tower, number): begins here


class OperatorTrace(TorchDispatchMode):
    """Record what runs inside `phase`: allocations and frees; `with_traffic`, also the bytes that operators move."""

    def __init__(self, with_traffic: bool = False) -> None:
        super().__init__()
        self.events: list[TraceEvent] = []
        self._phases = [OTHER]
        self._alive: dict[int, Any] = {}
        self._with_traffic = with_traffic

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._phases[-1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record inside, under `name`; phases nest."""
        self.begin(name)
        try:
            with nullcontext() if len(self._phases) > 2 else self:  # once: a mode entered twice sees operators twice
                yield
        finally:
            self.end()

    def begin(self, name: str, *_: Any) -> None:
        """Enter a phase; further arguments, those of a forward hook, are ignored."""
        self._phases.append(name)

    def end(self, *_: Any) -> None:
        """Leave the phase that was entered last."""
        self._phases.pop()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these as allocated, whichever operator returns them."""
        for tensor in tensors:
            self._alive[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in ((result,) if isinstance(result, Tensor) else tree_leaves(result))
                if isinstance(leaf, Tensor)]  # fmt: skip
        if self._with_traffic:
            moved, is_product = operator_bytes(func, args, kwargs or {}, made)
            if moved:
                self.events.append(
                    TraceEvent(self.current, moved=moved, product=moved * is_product, source=_logits_source())
                )
        for tensor in made:
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, phase = storage._cdata, storage.nbytes(), self.current
        if key in self._alive or not size:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.events.append(TraceEvent(phase, -size))

        self._alive[key] = weakref.ref(storage, freed)
        self.events.append(TraceEvent(phase, size))


def peak(events: Iterable[TraceEvent]) -> int:
    """The most bytes alive at one moment, beyond those alive before the first event."""
    live = most = 0
    for event in events:
        live += event.delta
        most = max(most, live)
    return most


# --- bytes of an operator ---------------------------------------------------------------------------------------------

_ATEN = torch.ops.aten
_PRODUCTS = {*flop_registry, _ATEN.addmm_, _ATEN._scaled_dot_product_flash_attention_for_cpu,
             _ATEN._scaled_dot_product_flash_attention_for_cpu_backward}  # fmt: skip
_MOVES_NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
_READS_WHAT_IT_RETURNS = ("embedding", "index_select", "index", "gather")  # a few rows of a table, not the table


def operator_bytes(operator: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> tuple[int, bool]:
    """Bytes of operands and results, each once, and whether it is a matrix product, convolution or attention.

    0 for views. An expanded tensor counts as what is in memory.
    """
    name = operator._schema.name.removeprefix("aten::")
    read_options = {key: value for key, value in kwargs.items() if key != "out"}
    operands = [leaf for leaf in tree_leaves((args, read_options)) if isinstance(leaf, Tensor)]
    if name in _MOVES_NOTHING or _is_view(operator, operands, made):
        return 0, False
    is_lookup = name in _READS_WHAT_IT_RETURNS
    read, written = sum(map(_nbytes, operands[is_lookup:])), sum(map(_nbytes, made))
    return read + written * (2 if is_lookup else 1), operator._overloadpacket in _PRODUCTS


def _is_view(operator: Any, operands: list[Tensor], made: list[Tensor]) -> bool:
    if operator._schema.is_mutable or not made:
        return not made
    storages = {tensor.untyped_storage()._cdata for tensor in operands}
    return all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _logits_source() -> str | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for file, name in LOGITS.items():
            if path.endswith(f"{file}.py"):
                return name
        frame = frame.f_back
    return None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within a with statement."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
