"""Properties of the teacher's targets that hold for any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.losses.comm import Solo
from model.losses.targets import Targets, dense_cross_entropy, dense_targets, sinkhorn, update_centre

pytestmark = pytest.mark.L0
SOLO = Solo()


def spread_evenly(teacher_RK: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """The distributions, for a teacher whose features are its logits."""
    teacher_KE = torch.eye(teacher_RK.shape[1], dtype=teacher_RK.dtype)
    bias_K = sinkhorn(teacher_RK, teacher_KE, temp, SOLO, iterations)
    return dense_targets(Targets(teacher_RK, teacher_KE, bias_K, temp))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), prototypes=st.integers(1, 9), size=st.floats(0.1, 3000), seed=st.integers(0, 99))
def test_sinkhorn_rows_are_finite_distributions_however_large_the_logits(
    rows: int, prototypes: int, size: float, seed: int
) -> None:
    target_RK = spread_evenly(
        size * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)), temp=0.04
    )
    assert torch.isfinite(target_RK).all()
    assert (target_RK >= 0).all()
    # Measured worst case 2.4e-7: one division a row.
    torch.testing.assert_close(target_RK.sum(dim=1), torch.ones(rows), rtol=0, atol=1e-6)


def test_sinkhorn_with_many_iterations_uses_every_prototype_equally() -> None:
    teacher_RK = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    mass_K = spread_evenly(teacher_RK, 0.5, iterations=50).sum(dim=0)
    torch.testing.assert_close(mass_K, torch.full((8,), 5.0), rtol=1e-4, atol=0)


def test_sinkhorn_breaks_the_collapse_that_a_softmax_keeps() -> None:
    teacher_RK = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    teacher_RK[:, 3] += 1.0  # every row prefers prototype 3
    assert (teacher_RK / 0.05).softmax(dim=1)[:, 3].min() > 0.99
    # The share of one prototype out of eight is 0.125.
    assert spread_evenly(teacher_RK, 0.05)[:, 3].max() < 0.25


def test_sinkhorn_equals_the_published_three_steps_done_by_hand() -> None:
    teacher_RK = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double() * 0.1
    q_RK = (teacher_RK / 0.05).exp()
    q_RK /= q_RK.sum()
    for _ in range(3):
        q_RK /= q_RK.sum(dim=0, keepdim=True) * 5
        q_RK /= q_RK.sum(dim=1, keepdim=True) * 6
    # Measured worst case 1.8e-7 against this float64 loop.
    torch.testing.assert_close(spread_evenly(teacher_RK.float(), 0.05), (q_RK * 6).float(), rtol=2e-6, atol=0)


def test_the_bias_carries_no_gradient_and_reads_bf16() -> None:
    teacher_RE, teacher_KE = torch.randn(4, 6).bfloat16().requires_grad_(), torch.randn(9, 6).bfloat16()
    for bias_K in (
        sinkhorn(teacher_RE, teacher_KE, 0.05, SOLO),
        update_centre(torch.zeros(9), teacher_RE, teacher_KE, 0.5, SOLO),
    ):
        assert bias_K.dtype == torch.float32
        assert not bias_K.requires_grad


def test_the_centre_is_the_mean_of_all_rows_and_stays_where_there_are_none() -> None:
    centre_K = torch.tensor([1.0, 2.0])
    rows = torch.tensor([[3.0, 0.0], [5.0, 4.0]])
    torch.testing.assert_close(update_centre(centre_K, rows, torch.eye(2), 0.5, SOLO), torch.tensor([2.5, 2.0]))
    torch.testing.assert_close(update_centre(centre_K, rows[:0], torch.eye(2), 0.5, SOLO), centre_K)


def test_cross_entropy_with_a_sure_target_is_minus_the_log_probability() -> None:
    student_RK = torch.tensor([[0.0, 0.2, 0.1]])
    found = dense_cross_entropy(student_RK, torch.tensor([[0.0, 1.0, 0.0]]), 0.1)
    torch.testing.assert_close(found, -(student_RK / 0.1).log_softmax(dim=1)[:, 1])
