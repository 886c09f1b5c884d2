"""Axial RoPE: its numbers, its identity rows, and that only relative positions matter."""

from __future__ import annotations

import math

import pytest
import torch

from model.packing import packed_layout
from model.rope import Rope, apply_rope

pytestmark = pytest.mark.L0
ROPE = Rope(head_width=8, base=100.0, dtype=torch.float32)


def test_periods_run_geometrically_from_one_towards_the_base() -> None:
    torch.testing.assert_close(ROPE.periods(), torch.tensor([1.0, 10.0]))
    assert Rope(16, 100.0, torch.bfloat16).periods().tolist() == [1.0, 3.15625, 10.0, 31.625]


@pytest.mark.parametrize("head_width", [24, 40, 48, 72, 80, 96, 64])
def test_bf16_rounds_exponents_too_as_the_released_weights_do(head_width: int) -> None:
    """Rounding matters where the quotients i / (E/4) are no short binary fractions: every width here but 64."""
    count = head_width // 4
    quotients = torch.tensor([i / count for i in range(count)], dtype=torch.float64)
    rounded, exact = 100.0 ** quotients.bfloat16().double(), 100.0**quotients
    assert torch.equal(Rope(head_width, 100.0, torch.bfloat16).periods(), rounded.bfloat16())
    assert torch.equal(rounded.bfloat16(), exact.bfloat16()) == (head_width == 64)
    torch.testing.assert_close(Rope(head_width, 100.0, torch.float32).periods(), exact.float(), rtol=1e-6, atol=0)


def test_periods_of_heads_of_24_channels_are_the_official_ones() -> None:
    assert Rope(24, 100.0, torch.bfloat16).periods().tolist() == [1.0, 2.15625, 4.65625, 10.0, 21.625, 46.25]


def test_table_holds_row_angles_then_column_angles_twice() -> None:
    cos_PE, sin_PE = ROPE.table((2, 3))
    down, across = -0.5, 2 / 3  # the last patch of the first row
    angles = [2 * math.pi * x / period for x in (down, across) for period in (1, 10)]
    expected = torch.tensor(angles * 2)
    torch.testing.assert_close(cos_PE[2], expected.cos())
    torch.testing.assert_close(sin_PE[2], expected.sin())


def test_prefix_and_padding_are_not_turned_and_patches_are() -> None:
    layout = packed_layout({"clip": (1, 16, 16), "ssl_local": (2, 8, 8)}, patch_size=8, prefix=2)
    x_THE = torch.randn(layout.tokens, 2, 8)
    y_THE = apply_rope(x_THE, ROPE.packed(layout, "cpu"))
    still = (x_THE == y_THE).flatten(1).all(1).nonzero().flatten().tolist()
    # Segments of 6, 3, 3 and 4 of padding; the one patch of a local crop sits at (0, 0): no turn.
    assert still == [0, 1, *range(6, 16)]


def test_attention_scores_depend_on_the_offset_of_two_patches_only() -> None:
    q, k = torch.randn(1, 1, 8).expand(16, 1, 8), torch.randn(1, 1, 8).expand(16, 1, 8)
    table_2PE = ROPE.table((4, 4))
    scores_PP = apply_rope(q, table_2PE).squeeze(1) @ apply_rope(k, table_2PE).squeeze(1).T
    # Patch 5 is (1, 1), patch 10 is (2, 2), patch 0 is (0, 0): the same step down and across.
    torch.testing.assert_close(scores_PP[0, 5], scores_PP[5, 10])
    assert not torch.allclose(scores_PP[0, 5], scores_PP[0, 1])


def test_turning_keeps_dtype_and_length() -> None:
    x_THE = torch.randn(6, 2, 8)
    turned_THE = apply_rope(x_THE, ROPE.table((2, 3)))
    torch.testing.assert_close(turned_THE.norm(dim=-1), x_THE.norm(dim=-1))
    assert apply_rope(x_THE.bfloat16(), ROPE.table((2, 3))).dtype == torch.bfloat16
