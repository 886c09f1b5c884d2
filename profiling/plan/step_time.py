"""How long a step takes, from what it asks for and how fast the device is: the planner's model of time.

    compute   = sum over components of  FLOPs / products  +  scores / attention  +  bytes / memory
    host      = operations * operation + passes through blocks * block_hooks
    exposed   = what waits  +  max(0, what does not wait - 0.8 compute)      (collectives)
    step      = max(compute, host) + exposed        on a GPU, where the host goes ahead
              = compute + operations * operation + all collectives               on a CPU

Collectives are those of profiling/step/communication.py.
Products and memory do not overlap inside a component: kernels run one after the other. What it leaves out: waiting for
data and decoding on the GPU, stragglers, collectives that slow the products beside them, reports and checkpoints.

    time = step_time(work, rates_of("h100"), collectives, links, world_size=256)
    time.seconds, time.compute, time.exposed, time.host
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from profiling.plan.rates import Links, Rates
from profiling.plan.work import Work
from profiling.step.communication import Collective

HIDDEN_BY = 0.8  # share of compute beside which collectives can run [assumed]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `communication` is all of it, `exposed` what the device waits for."""

    compute: float
    host: float
    communication: float
    exposed: float
    seconds: float

    @property
    def limit(self) -> str:
        """What a faster step would have to shorten."""
        if self.exposed > max(self.compute, self.host):
            return "communication"
        return "host" if self.host > self.compute else "compute"


def step_time(
    work: Sequence[Work], rates: Rates, collectives: Sequence[Collective], links: Links | None, world_size: int
) -> StepTime:
    """Of one rank. Without `links` nothing is sent."""
    compute = sum(seconds(each, rates) for each in work)
    operations = sum(each.operations for each in work) * rates.operation
    host = operations + sum(each.blocks for each in work) * rates.block_hooks
    hidden, waiting = _sent(collectives, links, world_size)
    if not rates.is_asynchronous:
        return StepTime(compute, host, hidden + waiting, hidden + waiting, compute + host + hidden + waiting)
    exposed = waiting + max(0.0, hidden - HIDDEN_BY * compute)
    return StepTime(compute, host, hidden + waiting, exposed, max(compute, host) + exposed)


def seconds(work: Work, rates: Rates) -> float:
    """Of one component on the device."""
    products = sum(flops / rates.products[precision] for precision, flops in work.products.items() if flops)
    return products + work.scores / rates.attention + work.bytes / rates.memory


def _sent(collectives: Sequence[Collective], links: Links | None, world_size: int) -> tuple[float, float]:
    """Seconds of what computation can hide, and of what it waits for."""
    if links is None:
        return 0.0, 0.0
    spent = {False: 0.0, True: 0.0}
    for each in collectives:
        spent[each.waits] += links.seconds(each.wire_bytes(world_size), each.num_messages, each.ranks(world_size))
    return spent[False], spent[True]
