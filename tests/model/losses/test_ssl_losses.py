"""The ssl losses do what their pseudo-code says, loop by loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from configs import UserError
from model.losses.comm import Solo
from model.losses.dino import dino_global_loss, dino_local_loss
from model.losses.ibot import ibot_loss
from model.losses.koleo import koleo_loss
from model.losses.targets import Targets

pytestmark = pytest.mark.L0
S, N, K, TEMP = 3, 4, 7, 0.1
LOGITS = torch.eye(K)  # prototypes for which rows of features are rows of logits


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_cross_entropy(student_K: Tensor, target_K: Tensor) -> float:
    return -float((target_K * torch.log_softmax(student_K / TEMP, dim=0)).sum())


def asking_for(target_RK: Tensor) -> Targets:
    return Targets(target_RK.log(), LOGITS, torch.zeros(K), 1.0)


def test_dino_is_the_mean_over_all_pairs_of_different_crops() -> None:
    student_global, student_local = randn(2 * S, K, seed=1), randn(N * S, K, seed=2)
    target = randn(2 * S, K, seed=3).softmax(dim=1)
    pairs = []
    for i in range(S):
        for view in range(2):
            pairs += [one_cross_entropy(student_local[crop * S + i], target[view * S + i]) for crop in range(N)]
            pairs += [one_cross_entropy(student_global[(1 - view) * S + i], target[view * S + i])]
    assert len(pairs) == S * (2 + 2 * N)
    local = dino_local_loss(student_local, LOGITS, asking_for(target), TEMP)
    found = local + dino_global_loss(student_global, LOGITS, asking_for(target), TEMP, N)
    assert float(found) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


def test_dino_without_local_crops_is_the_mean_over_the_global_pairs() -> None:
    student, target = randn(2 * S, K, seed=1), randn(2 * S, K, seed=3).softmax(dim=1)
    pairs = [one_cross_entropy(student[(crop + S) % (2 * S)], target[crop]) for crop in range(2 * S)]
    none = torch.zeros(0, K, requires_grad=True)
    found = dino_global_loss(student, LOGITS, asking_for(target), TEMP, 0)
    assert float(found) == pytest.approx(sum(pairs) / (2 * S), rel=1e-6)
    nothing = dino_local_loss(none, LOGITS, asking_for(target), TEMP)
    nothing.backward()
    assert nothing.item() == 0.0


def test_a_crop_weighs_the_same_whatever_it_hides() -> None:
    hidden = [1, 4, 0, 2]
    weight = torch.cat([torch.full((n,), 1 / n) for n in hidden if n])
    student, target = randn(7, K, seed=1), randn(7, K, seed=2).softmax(dim=1)
    crops = torch.arange(4).repeat_interleave(torch.tensor(hidden))
    means = [
        sum(one_cross_entropy(student[p], target[p]) for p in torch.where(crops == c)[0]) / max(hidden[c], 1)
        for c in range(4)
    ]
    found = ibot_loss(student, LOGITS, asking_for(target), weight, TEMP, num_crops=4)
    assert float(found) == pytest.approx(sum(means) / 4, rel=1e-6)


def test_koleo_measures_the_nearest_neighbour_inside_a_view_only() -> None:
    corners = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # on the circle: 90 degrees apart, then 180
    both = torch.cat([corners, corners])  # the same image twice, once a view: no neighbour of itself
    assert float(koleo_loss(both, Solo())) == pytest.approx(-2 * math.log(math.sqrt(2)), rel=1e-6)


def test_koleo_pushes_neighbours_apart_and_ignores_length() -> None:
    cls = randn(2 * S, 5).requires_grad_()
    loss = koleo_loss(cls, Solo())
    (step,) = torch.autograd.grad(loss, cls)
    assert koleo_loss(cls - 0.01 * step, Solo()) < loss
    torch.testing.assert_close(koleo_loss(7 * cls, Solo()), loss)


def test_koleo_of_a_single_image_names_the_keys_to_change() -> None:
    with pytest.raises(UserError, match=r"batch\.ssl=1.*objectives\.ssl\.koleo=0"):
        koleo_loss(randn(2, 5), Solo())
