"""Schedules: pure functions with known corners."""

import math

import pytest

from engine.schedule import cosine, learning_rate, teacher_momentum, teacher_temperature
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_learning_rate_warms_up_linearly_then_falls_by_a_cosine() -> None:
    config = tiny_config("optim.steps=110", "optim.warmup=0.0909", "optim.lr=1.0", "optim.final_lr=0.1")
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_the_peak_grows_with_the_square_root_of_the_batch() -> None:
    at_12, at_48 = (tiny_config(f"batch.clip={clip}", "optim.lr=1.0") for clip in (12, 48))
    assert learning_rate(0, at_48) == pytest.approx(2 * learning_rate(0, at_12))


def test_teacher_momentum_ends_at_its_final_value() -> None:
    config = tiny_config("optim.steps=100", "teacher.momentum=0.994")
    assert teacher_momentum(0, config) == pytest.approx(0.994)
    assert teacher_momentum(50, config) == pytest.approx(0.997)
    assert teacher_momentum(100, config) == pytest.approx(1.0)


def test_a_fixed_teacher_momentum_stays() -> None:
    config = tiny_config("teacher.momentum=0.9", "teacher.final_momentum=0.9")
    assert {teacher_momentum(step, config) for step in range(6)} == {0.9}


def test_teacher_temperature_warms_up_over_its_share_of_the_run() -> None:
    config = tiny_config("optim.steps=100")
    values = [teacher_temperature(step, config) for step in (0, 15, 30, 99)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_cosine_is_constant_after_its_end() -> None:
    assert cosine(2.0, 1.0, 3.0) == 1.0
    assert math.isclose(cosine(2.0, 1.0, 0.5), 1.5)
