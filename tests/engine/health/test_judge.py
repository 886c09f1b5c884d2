"""A step is judged by its gradient's norm alone, on the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.run import AnomalyPolicy
from engine.checkpoint.pieces import Pieces, write_pieces
from engine.health.judge import Judge

pytestmark = pytest.mark.L0


def judge(**settings: Any) -> Judge:
    return Judge(AnomalyPolicy(**settings), torch.device("cpu"), "model")


def judged(by: Judge, *norms: float) -> list[bool]:
    return [bool(by(torch.tensor(norm, dtype=torch.float64))) for norm in norms]


def test_a_norm_that_is_no_number_is_left_out_whatever_the_policy() -> None:
    by = judge()
    assert judged(by, 1.0, math.nan, math.inf, -1.0, 1e30) == [False, True, True, True, False]
    assert by.counts.tolist() == [3, 0]
    by.forget()
    assert by.counts.tolist() == [0, 0]


def test_a_spike_is_left_out_with_skip_and_only_counted_with_rollback() -> None:
    for policy, is_left_out in (("skip", True), ("rollback", False)):
        by = judge(spike=policy, spike_window=4, spike_factor=3)
        assert judged(by, 1.0, 100.0, 1.0, 2.0) == [False] * 4, "the window was not full"
        assert judged(by, 3.0, 6.01) == [False, is_left_out]  # thrice 1, and more than thrice 2
        assert by.counts.tolist() == [0, 1]


def test_a_norm_that_is_no_number_does_not_enter_the_window() -> None:
    by = judge(spike="skip", spike_window=4, spike_factor=3)
    judged(by, 1.0, 1.0, 1.0, 1.0, math.nan, math.inf)
    assert by.recent is not None
    assert by.recent.tolist() == [1.0] * 4


def test_another_level_is_the_usual_one_half_a_window_later() -> None:
    by = judge(spike="skip", spike_window=8, spike_factor=2)
    judged(by, *[1.0] * 8)
    assert judged(by, *[10.0] * 8) == [True] * 5 + [False] * 3  # of eight, the median is the fourth


@given(st.lists(st.floats(0.1, 10), min_size=4, max_size=20), st.floats(0.1, 100))
def test_a_spike_is_what_exceeds_the_median_of_the_last_norms(norms: list[float], last: float) -> None:
    by = judge(spike="skip", spike_window=4, spike_factor=1.5)
    judged(by, *norms)
    median = torch.tensor(norms[-4:]).median()
    assert judged(by, last) == [bool(torch.tensor(last) > 1.5 * median)]


def test_the_window_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    first, again, longer = (judge(spike="skip", spike_window=window) for window in (4, 4, 5))
    judged(first, 1.0, 2.0, 3.0, 4.0)
    write_pieces(tmp_path / "rank-00000.safetensors", first.pieces())
    for each in (again, longer):
        judged(each, math.nan)
        each.restore(Pieces(tmp_path))
        assert each.counts.tolist() == [0, 0]
    assert again.recent is not None
    assert longer.recent is not None
    assert again.recent.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert longer.recent.isnan().all()
    assert judge().pieces() == []
