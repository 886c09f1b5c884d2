"""What the contrastive losses are for: pairs found, the unrelated told apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.losses.clip import sigmoid_clip_loss, softmax_clip_loss
from model.losses.comm import Solo

pytestmark = pytest.mark.L0
SCALE, BIAS = torch.tensor([50.0]), torch.tensor([-25.0])


def test_orthogonal_pairs_are_found_and_swapped_ones_are_not() -> None:
    image = torch.eye(6)
    for loss in (
        lambda text: softmax_clip_loss(image, text, SCALE, Solo()),
        lambda text: sigmoid_clip_loss(image, text, SCALE, BIAS, Solo()),
    ):
        paired, swapped = loss(image), loss(image.roll(1, dims=0))
        assert paired.accuracy == 1.0
        assert paired.loss < 1e-6
        assert swapped.accuracy == 0.0
        # The answer and one alternative are wrong by the whole scale: 50 for softmax, 25 + 25 for sigmoid.
        assert swapped.loss == pytest.approx(50.0, rel=1e-3)


def test_vectors_that_say_nothing_cost_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4), dim=1)
    assert float(softmax_clip_loss(same, same, SCALE, Solo()).loss) == pytest.approx(math.log(8), rel=1e-6)


def test_losses_are_float32_for_bf16_vectors() -> None:
    image = F.normalize(torch.randn(4, 8), dim=1).bfloat16()
    assert softmax_clip_loss(image, image, SCALE.bfloat16(), Solo()).loss.dtype == torch.float32
    assert sigmoid_clip_loss(image, image, SCALE.bfloat16(), BIAS.bfloat16(), Solo()).loss.dtype == torch.float32
