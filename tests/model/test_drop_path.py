"""Stochastic depth by segments: the scale, the constant counts, the plain block at its end, and the saving."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs import UserError
from configs.model import Vit
from engine.random_draws import DropPathDraws, drop_path_draws
from kernels.attention import Segments
from model.block import Block
from model.initialise import initialise
from model.packing import CropGroup, PackedLayout, RankBatchSizes, kept_segments
from model.pretrainer import Pretrainer
from model.rope import Rope
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
GROUPS = (CropGroup("clip", 6, 17, (4, 4)), CropGroup("ssl_local", 8, 5, (2, 2)))
LAYOUT = PackedLayout(GROUPS, pad=2)  # 144 tokens


def lively_block(rate: float, dtype: torch.dtype = torch.float32) -> Block:
    block = Block(Vit(width=32, depth=1, heads=2, drop_path=rate), "matmul")
    generator = torch.Generator().manual_seed(5)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return block.to(dtype)


def inputs() -> tuple[Tensor, Tensor]:
    x_TD = torch.randn(LAYOUT.tokens, 32, generator=torch.Generator().manual_seed(6))
    return x_TD, Rope(16, 100.0, torch.float32).packed(LAYOUT, "cpu")


def drawn_tokens(rate: float, step: int, segments: Segments = LAYOUT.segments) -> Tensor:
    """(2, K): what one block gets at `step`."""
    draws = DropPathDraws(segments, rate, depth=1, seed=0, rank=0)
    return kept_segments(segments, rate).tokens(draws.draw(step), segments)[0]


@given(
    counts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=3),
    rate=st.floats(0.0, 0.99),
    step=st.integers(0, 10**6),
)
def test_kept_counts_are_constant_and_tokens_are_whole_segments(
    counts: list[tuple[int, int]], rate: float, step: int
) -> None:
    segments = tuple(counts)
    kept, tokens_2K = kept_segments(segments, rate), drawn_tokens(rate, step, segments)
    assert [stays for stays, _ in kept.segments] == [max(1, round((1 - rate) * count)) for count, _ in segments]
    assert tokens_2K.shape[1] % 16 == 0
    for tokens_K in tokens_2K:
        assert tokens_K[kept.used :].count_nonzero() == 0
        at, first = 0, 0
        for (stays, length), (count, _) in zip(kept.segments, segments, strict=True):
            rows_SN = tokens_K[at : at + stays * length].unflatten(0, (stays, length)) - first
            assert bool((rows_SN[:, 0] % length == 0).all())
            assert torch.equal(rows_SN - rows_SN[:, :1], torch.arange(length).expand_as(rows_SN))
            numbers = (rows_SN[:, 0] // length).tolist()
            assert numbers == sorted(set(numbers))
            assert 0 <= numbers[0] <= numbers[-1] < count
            at, first = at + stays * length, first + count * length


def test_draws_are_a_function_of_seed_step_block_branch_and_rank_alone() -> None:
    one = DropPathDraws(((30, 5),), 0.5, depth=3, seed=4, rank=1)
    assert torch.equal(one.draw(7), DropPathDraws(((30, 5),), 0.5, depth=3, seed=4, rank=1).draw(7))
    others = [
        DropPathDraws(((30, 5),), 0.5, depth=3, seed=5, rank=1).draw(7),
        DropPathDraws(((30, 5),), 0.5, depth=3, seed=4, rank=0).draw(7),
        one.draw(8),
    ]
    assert not any(torch.equal(one.draw(7), other) for other in others)
    rows = {tuple(row) for row in one.draw(7).flatten(0, 1).tolist()}
    assert len(rows) == 6, "two branches of three blocks drew alike"


def test_every_segment_is_kept_equally_often() -> None:
    draws = DropPathDraws(((10, 5), (4, 3)), 0.3, depth=2, seed=0, rank=0)
    kept = torch.cat([draws.draw(step).flatten(0, 1) for step in range(1000)])
    for share, idx, count in ((0.7, kept[:, :7], 10), (0.75, kept[:, 7:], 4)):
        shares = torch.bincount(idx.flatten(), minlength=count) / len(kept)
        # 4000 draws: a share's standard deviation is 0.007, and none of 14 is four of them off.
        torch.testing.assert_close(shares, torch.full((count,), share), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_that_keeps_all_is_the_plain_block_bitwise(dtype: torch.dtype) -> None:
    block, (x_TD, rope_2TE) = lively_block(0.0, dtype), inputs()
    everything = drawn_tokens(0.0, step=0)
    outcomes = []
    for kept_idx in (None, everything):
        x = x_TD.to(dtype).requires_grad_()
        used = block(x, rope_2TE, LAYOUT.segments, kept_idx)[:-2]  # the padding is nobody's
        grads = torch.autograd.grad((used * torch.linspace(-1, 1, 32).to(dtype)).sum(), [x, *block.parameters()])
        outcomes.append([used, grads[0][:-2], *grads[1:]])
    for number, (plain, kept) in enumerate(zip(*outcomes, strict=True)):
        if number == 0 or dtype == torch.bfloat16:
            assert torch.equal(plain, kept)
        else:  # a norm's input takes three gradients in float32, summed in another order: measured worst 2e-7
            torch.testing.assert_close(kept, plain, rtol=0, atol=2e-6 * plain.abs().max().item())


def test_the_scale_makes_the_expectation_the_full_branch() -> None:
    """Exact: every one of the (6 choose 4) subsets once, of one branch on one run of segments."""
    segments, block, (x_TD, rope_2TE) = ((6, 17),), lively_block(1 / 3), inputs()
    x_TD, rope_2TE = x_TD[:102], rope_2TE[:, :102]
    kept = kept_segments(segments, 1 / 3)
    assert kept.segments == ((4, 17),)
    subsets = torch.combinations(torch.arange(6), 4)  # (15, 4)
    tokens_NK = kept.tokens(subsets, segments)
    sums_TD = torch.zeros_like(x_TD)
    for token_idx_K in tokens_NK:
        y_KD = block._attention_branch(x_TD[token_idx_K], rope_2TE[:, token_idx_K], kept.segments)
        sums_TD += kept.add_back(x_TD, y_KD, token_idx_K)
    full_TD = x_TD + block._attention_branch(x_TD, rope_2TE, segments)
    # Measured worst 1.2e-6 of 12: rounding of 15 sums. Without the scale a third of the branch, 0.5, is missing.
    torch.testing.assert_close(sums_TD / 15, full_TD, rtol=0, atol=1e-5)


def test_dropped_segments_pass_by_and_kept_ones_do_not_see_them() -> None:
    block, (x_TD, rope_2TE) = lively_block(0.5), inputs()
    x_TD.requires_grad_()
    kept_idx = drawn_tokens(0.5, step=3)
    y_TD = block(x_TD, rope_2TE, LAYOUT.segments, kept_idx)
    seen = torch.zeros(LAYOUT.tokens, dtype=torch.bool)
    seen[kept_idx[:, : kept_segments(LAYOUT.segments, 0.5).used].flatten()] = True
    assert torch.equal(y_TD[~seen], x_TD[~seen])
    assert not torch.equal(y_TD[seen], x_TD[seen])
    [grad_TD] = torch.autograd.grad(y_TD[seen].sum(), x_TD)
    assert grad_TD[~seen].count_nonzero() == 0


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_flops_fall_by_the_drop_share(rate: float) -> None:
    segments = ((8, 16), (16, 4))  # 192 tokens; both rates leave whole counts and multiples of 16 tokens
    block, x_TD = lively_block(rate), torch.randn(192, 32).requires_grad_()
    rope_2TE = Rope(16, 100.0, torch.float32).packed(PackedLayout((CropGroup("all", 1, 192, (12, 16)),), 0), "cpu")
    counts = []
    for kept_idx in (None, drawn_tokens(rate, 0, segments)):
        with FlopCounterMode(display=False) as counter:
            block(x_TD, rope_2TE, segments, kept_idx).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == (1 - rate) * counts[0]


def test_the_student_drops_and_the_teacher_does_not() -> None:
    config = tiny_config("model.trunk.drop_path=0.5")
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    draws, batch = drop_path_draws(config, rank=0, world_size=1), random_batch(config, step=0)
    assert draws is not None
    tensors = model_inputs(batch)
    full, dropped = model(**tensors).ssl, model(**tensors, kept_idx=draws.draw(0)).ssl
    assert torch.equal(full.teacher_global_GE, dropped.teacher_global_GE)
    assert not torch.equal(full.student_global_GE, dropped.student_global_GE)


def test_rate_zero_draws_nothing_and_a_rate_without_effect_is_refused() -> None:
    assert drop_path_draws(tiny_config(), rank=0, world_size=1) is None
    draws = drop_path_draws(tiny_config("model.trunk.drop_path=0.3"), rank=0, world_size=2)
    assert str(draws) == "8 of 12 segments of 17 tokens, 4 of 6 segments of 5 tokens"
    with pytest.raises(UserError, match=r"drop_path=0.01 drops none of a rank's 12, 6 segments: .* raise the rate"):
        drop_path_draws(tiny_config("model.trunk.drop_path=0.01"), rank=0, world_size=2)
    with pytest.raises(UserError, match=r"decoder.drop_path=0.1: stochastic depth is the trunk's alone"):
        tiny_config("model.decoder.drop_path=0.1")
