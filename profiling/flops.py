"""What a step computes, as a table: FLOPs of matrix products by component and pass, and what was left out.

    flops = step_flops(config, rows)         # profiling/step/flops.py: which layers meet how many tokens
    flops.model_flops                        # forward + backward, each product once: the numerator of MFU
    flops.hardware_flops                     # with what is computed again: the numerator of HFU
    flops.as_table()                         # a rich table: component, objective, forward, backward, again, saved

Conventions. A multiply-add is two FLOPs; products of matrices and convolutions count, whatever is done number by
number does not (norms, RoPE, gates, softmax, optimizer, EMA), nor does a matrix times a vector. Attention counts all
its scores, those that a mask hides included. These are the rules of torch.utils.flop_counter, which the tests hold
every count against. What a fused kernel computes again inside itself (FlashAttention's scores, Triton's prototype
logits) is not counted.

An instrument: it knows no model. The formulas here take plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table


def linear(rows: float, fan_in: int, fan_out: int) -> float:
    """(rows, fan_in) @ (fan_in, fan_out)."""
    return 2 * rows * fan_in * fan_out


def attention(squares: float, width: int) -> float:
    """q k^T and p v of all heads; `squares` is the sum over segments of length^2, `width` that of all heads."""
    return 4 * squares * width


def convolution(positions: float, channels_in: int, channels_out: int, side: int) -> float:
    """A side x side kernel at so many output positions."""
    return linear(positions, channels_in * side**2, channels_out)


@dataclass(frozen=True)
class Component:
    """FLOPs of one part of the step, of one rank. `saved` is what forward and backward would take more if nothing
    were left out; negative where leaving out costs more padding than it saves. `scores` is that part of `forward` which
    is between tokens: the two products of attention."""

    name: str
    objective: str  # clip, ssl, rec, or "shared" where no one objective asks for it
    forward: float
    backward: float = 0
    recompute: float = 0
    saved: float = 0
    scores: float = 0

    def __add__(self, other: Component) -> Component:
        assert (self.name, self.objective) == (other.name, other.objective)
        numbers = {key: getattr(self, key) + getattr(other, key) for key in (*PASSES, "scores")}
        return replace(self, **numbers)

    def __mul__(self, factor: float) -> Component:
        return replace(self, **{key: factor * getattr(self, key) for key in (*PASSES, "scores")})


PASSES = ("forward", "backward", "recompute", "saved")


@dataclass(frozen=True)
class StepFlops:
    """One step of one rank. `savings` divides what was saved by its cause."""

    components: tuple[Component, ...]
    savings: dict[str, float]

    @classmethod
    def of(cls, parts: Iterable[Component], savings: dict[str, float]) -> StepFlops:
        """Parts of one name become one component, in the order of their first; those without any FLOPs are left out."""
        by_name: dict[str, Component] = {}
        for part in parts:
            by_name[part.name] = by_name[part.name] + part if part.name in by_name else part
        present = tuple(c for c in by_name.values() if any(getattr(c, key) for key in PASSES))
        return cls(present, {cause: saved for cause, saved in savings.items() if saved})

    def total(self, key: str) -> float:
        """Over all components; `key` is one of PASSES."""
        return math.fsum(getattr(component, key) for component in self.components)

    @property
    def model_flops(self) -> float:
        """What the step is about: forward and backward, each product once."""
        return self.total("forward") + self.total("backward")

    @property
    def hardware_flops(self) -> float:
        """What the device computes: checkpointing, gradient cache and chunked losses included."""
        return self.model_flops + self.total("recompute")

    @property
    def full_flops(self) -> float:
        """What the step would take if nothing were left out."""
        return self.model_flops + self.total("saved")

    def __getitem__(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)

    def by_objective(self) -> dict[str, float]:
        """Model FLOPs of clip, ssl, rec and of what they share."""
        shares = dict.fromkeys((component.objective for component in self.components), 0.0)
        for component in self.components:
            shares[component.objective] += component.forward + component.backward
        return shares

    def as_dict(self) -> dict[str, Any]:
        """For JSON; FLOPs of one step of one rank."""
        return {
            "components": [asdict(component) for component in self.components],
            "savings": self.savings,
            "by_objective": self.by_objective(),
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "full_flops": self.full_flops,
        }

    def as_table(self) -> Table:
        """In GFLOP; the last column is the share of the model FLOPs."""
        table = Table(title="GFLOP of one step of one rank", title_justify="left", show_footer=True)
        table.add_column("component", footer="sum", no_wrap=True)
        table.add_column("objective")
        for key in PASSES:
            table.add_column(key, footer=_giga(self.total(key)), justify="right")
        table.add_column("share", justify="right")
        for component in self.components:
            numbers = [_giga(getattr(component, key)) for key in PASSES]
            share = (component.forward + component.backward) / self.model_flops
            table.add_row(component.name, component.objective, *numbers, f"{share:.1%}")
        return table


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops else ""
