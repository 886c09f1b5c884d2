"""An alarm is told once until it is over."""

from __future__ import annotations

import math

import pytest

from engine.health.alarms import Alarms, Rule, rules
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_an_alarm_is_told_once_and_is_over_a_tenth_inside_the_range() -> None:
    said: list[str] = []
    alarms = Alarms([Rule("x", "health/x", 1.0, 10.0, "why it matters")], said.append)
    seen = [2.0, 0.5, 1.05, 0.9, 1.05, 1.2, 9.5, 11.0, 9.5, math.nan, 8.9]
    on = [alarms.read(step, {"health/x": value})["health/alarm/x"] for step, value in enumerate(seen)]
    assert on == [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert said == [
        "alarm at step 1: health/x is 0.5, not between 1 and 10: why it matters",
        "alarm over at step 5: health/x is 1.2",
        "alarm at step 7: health/x is 11, not between 1 and 10: why it matters",
        "alarm over at step 10: health/x is 8.9",
    ]


def test_pretraining_watches_teacher_prototypes_and_latents() -> None:
    config = tiny_config("system.checks.alarms.prototype_share=0.25")
    healthy = {"teacher_entropy": 2.0, "prototype_share": 0.1, "latent_std_min": 0.5, "latent_std_max": 2.0}
    for name, value in {
        "teacher_entropy": 0.01, "prototype_share": 0.3, "latent_std_min": 0.001, "latent_std_max": 1e3
    }.items():  # fmt: skip
        said: list[str] = []
        found = Alarms(rules(config), said.append).read(
            1, {f"health/{k}": v for k, v in (healthy | {name: value}).items()}
        )
        assert {key for key, is_on in found.items() if is_on} == {f"health/alarm/{name}"}
        assert len(said) == 1
    assert Alarms(rules(config), said.append).read(1, {"health/teacher_entropy": math.log(48)})
    assert said[-1].startswith("alarm at step 1: health/teacher_entropy is 3.871")
    assert said[-1].endswith("the teacher's targets are one-hot or uniform")
    assert Alarms(rules(config), said.append).read(1, {"loss/total": 1.0}) == {}
