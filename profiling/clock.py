"""Times variants side by side: in one process, in turns, so that what the machine does meanwhile hits all alike.

    times = alternate({"plain": plain, "fused": fused}, rounds=11)
    times["fused"].median          # seconds
    times.ratio("plain", "fused")  # 1.8: the median over rounds of plain's time / fused's time

The ratio is paired: both times of one quotient were taken within one round. On a shared machine single times vary by
half, medians by a tenth, paired ratios by a few percent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 with fewer than 4 rounds."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class Comparison(dict[str, Times]):
    """Variant -> its times, all of the same rounds."""

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long `slow` takes as `fast`: the median over rounds."""
        pairs = zip(self[slow].seconds, self[fast].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmups: int = 2,
    on_timing: Callable[[str, int, float], None] = lambda name, number, seconds: None,
) -> Comparison:
    """Runs every variant once a round, in an order that rotates; waits for the GPU where there is one.

    `warmups` calls of each come first and do not count: they compile, allocate and fill caches. `on_timing` is
    called with variant, round and seconds after every call; the last warm-up call is round 0, those before it -1, ...
    """
    for name, call in variants.items():
        for number in range(1 - warmups, 1):
            on_timing(name, number, _time(call))
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_time(variants[name]))
            on_timing(name, number + 1, seconds[name][-1])
    return Comparison({name: Times(tuple(seconds[name])) for name in names})


def _time(call: Callable[[], object]) -> float:
    _wait()
    begin = time.perf_counter()
    result = call()
    _wait()
    seconds = time.perf_counter() - begin
    del result  # freeing it is not the variant's time
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
