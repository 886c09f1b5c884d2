"""Orders are permutations, mask ratios follow MAR's distribution, schedules draw every token once."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from configs.generator import MaskRatio
from model.generator.tokens import (
    assign_head_rows,
    cosine_schedule,
    max_visible,
    mean_mask_ratio,
    num_visible,
    permute_tokens,
    sample_mask_ratio,
    sample_order,
    unpermute_tokens,
)

pytestmark = pytest.mark.L0
MAR = MaskRatio()


@pytest.mark.parametrize("order", ["masked", "random", "raster"])
def test_an_order_holds_every_token_once_and_arranging_is_undone(order: str) -> None:
    uniform_BN = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    order_BN = sample_order(order, uniform_BN)
    assert torch.equal(order_BN.sort(dim=1).values, torch.arange(20).expand(6, 20))
    assert (order == "raster") == torch.equal(order_BN[0], order_BN[1])
    tokens_BNC = torch.arange(6 * 20 * 2.0).view(6, 20, 2)
    arranged_BNC = permute_tokens(tokens_BNC, order_BN)
    assert torch.equal(arranged_BNC[3, 7], tokens_BNC[3, order_BN[3, 7]])
    assert torch.equal(unpermute_tokens(arranged_BNC, order_BN), tokens_BNC)


def test_every_place_is_first_equally_often() -> None:
    first_B = sample_order("random", torch.rand(8000, 8, generator=torch.Generator().manual_seed(0)))[:, 0]
    assert stats.chisquare(first_B.bincount(minlength=8)).pvalue > 0.01


@pytest.mark.parametrize("ratio", [MAR, MaskRatio(low=0.3, std=0.4)])
def test_mask_ratios_follow_the_truncated_normal(ratio: MaskRatio) -> None:
    law = stats.truncnorm((ratio.low - 1) / ratio.std, 0, loc=1, scale=ratio.std)
    uniform_B = torch.linspace(0.001, 0.999, 999)
    # Measured worst 5e-16; another low or std differs by more than 0.01.
    torch.testing.assert_close(
        sample_mask_ratio(uniform_B, ratio), torch.from_numpy(law.ppf(uniform_B.double())), atol=1e-12, rtol=0
    )
    assert mean_mask_ratio(ratio) == pytest.approx(law.mean(), abs=1e-9)


def test_visible_tokens_are_what_the_ratio_leaves_and_never_too_many() -> None:
    ratio_B = torch.tensor([0.7, 0.70001, 0.9, 1.0], dtype=torch.float64)
    assert num_visible(256, ratio_B, MAR).tolist() == [76, 76, 25, 0]
    assert (max_visible(256, MAR), max_visible(10, MAR), max_visible(2, MAR)) == (76, 3, 0)


@pytest.mark.parametrize(("tokens", "iterations"), [(256, 64), (256, 256), (16, 4), (16, 16), (5, 1), (7, 6)])
def test_a_schedule_draws_every_token_once_and_more_towards_the_end(tokens: int, iterations: int) -> None:
    counts = cosine_schedule(tokens, iterations)
    assert len(counts) == iterations
    assert sum(counts) == tokens
    assert min(counts) >= 1
    half = iterations // 2
    assert sum(counts[:half]) <= sum(counts[iterations - half :])


def test_a_schedule_is_the_cosine() -> None:
    assert cosine_schedule(16, 4) == (2, 3, 5, 6)  # 16 -> floor(14.8), floor(11.3), floor(6.1), 0


def test_rows_are_dealt_evenly_to_hidden_tokens_alone() -> None:
    visible_B = torch.tensor([0, 2, 5, 9])
    rows = assign_head_rows(visible_B, tokens=10, rows=23)
    for sample, seen in enumerate(visible_B.tolist()):
        counts = (rows[sample] - 10 * sample).bincount(minlength=10)
        assert len(counts) == 10
        assert counts[:seen].sum() == 0
        assert counts[seen:].max() - counts[seen:].min() <= 1
