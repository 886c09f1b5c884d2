"""Figures of a report that a person should look at: one line when they leave their range, one when they are back.

    alarms = Alarms(rules(config), say=reporter.say)
    alarms.read(step, {"health/teacher_entropy": 0.1, ...})    # {"health/alarm/teacher_entropy": 1.0, ...}, and says so

A figure is back when it is a tenth inside its range: one that wavers around the limit is told once. Nothing acts on an
alarm; ranges are system.checks.alarms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from configs import Config, RunConfig

_INSIDE = 0.1  # of a limit


@dataclass(frozen=True)
class Rule:
    """`figure` of a report belongs between `low` and `high`."""

    name: str
    figure: str
    low: float
    high: float
    meaning: str  # of leaving it

    def is_outside(self, value: float) -> bool:
        """Whether it raises the alarm."""
        return value < self.low or value > self.high

    def is_well_inside(self, value: float) -> bool:
        """Whether it ends it."""
        return self.low * (1 + _INSIDE) <= value <= self.high * (1 - _INSIDE)


def rules(config: RunConfig) -> list[Rule]:
    """Of this kind of run: a report without a figure raises no alarm over it."""
    if not isinstance(config, Config):
        return []
    limits, uniform = config.system.checks.alarms, math.log(config.model.prototypes.num)
    sure, unsure = (share * uniform for share in limits.teacher_entropy)
    flat, wild = limits.latent_std
    return [
        Rule("teacher_entropy", "health/teacher_entropy", sure, unsure, "the teacher's targets are one-hot or uniform"),
        Rule("prototype_share", "health/prototype_share", 0.0, limits.prototype_share, "the prototypes collapse"),
        Rule("latent_std_min", "health/latent_std_min", flat, math.inf, "a latent channel is constant"),
        Rule("latent_std_max", "health/latent_std_max", 0.0, wild, "a latent channel grows without bound"),
    ]


class Alarms:
    """Remembers which are on; `say` takes a line for the log."""

    def __init__(self, rules: list[Rule], say: Callable[[str], None]) -> None:
        self._rules, self._say, self._on = rules, say, set[str]()

    def read(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """`health/alarm/NAME`, 1 or 0, for the figures of this report."""
        found = {}
        for rule in self._rules:
            if rule.figure in values:
                self._follow(rule, step, values[rule.figure])
                found[f"health/alarm/{rule.name}"] = float(rule.name in self._on)
        return found

    def _follow(self, rule: Rule, step: int, value: float) -> None:
        if rule.name not in self._on and rule.is_outside(value):
            self._on.add(rule.name)
            self._say(
                f"alarm at step {step}: {rule.figure} is {value:.4g}, not between {rule.low:.4g} and {rule.high:.4g}: "
                f"{rule.meaning}"
            )
        elif rule.name in self._on and rule.is_well_inside(value):
            self._on.remove(rule.name)
            self._say(f"alarm over at step {step}: {rule.figure} is {value:.4g}")
