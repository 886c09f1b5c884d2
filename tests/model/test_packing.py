"""The packed layout: literal numbers, and no token lost or shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from model.packing import ALIGN, packed_layout

pytestmark = pytest.mark.L0
CROPS = {"clip": (2, 32, 32), "ssl_global": (2, 32, 32), "ssl_local": (4, 16, 16)}


def test_layout_of_a_small_step_in_literal_numbers() -> None:
    layout = packed_layout(CROPS, patch_size=16, prefix=1)
    assert [(g.name, g.segments, g.length, g.grid) for g in layout.groups] == [
        ("clip", 2, 5, (2, 2)),
        ("ssl_global", 2, 5, (2, 2)),
        ("ssl_local", 4, 2, (1, 1)),
    ]
    assert (layout.tokens, layout.pad, layout.segments) == (32, 4, ((4, 5), (4, 2)))
    assert [layout.slice(name) for name in CROPS] == [slice(0, 10), slice(10, 20), slice(20, 28)]


def test_rows_cls_and_patches_are_the_tokens_they_name() -> None:
    layout = packed_layout(CROPS, patch_size=16, prefix=2)  # CLS and one register: segments of 6, 6 and 3
    x_TD = torch.arange(layout.tokens).unsqueeze(1)
    assert layout.rows(x_TD, "ssl_local").squeeze(-1).tolist() == [
        [24, 25, 26],
        [27, 28, 29],
        [30, 31, 32],
        [33, 34, 35],
    ]
    assert layout.cls(x_TD, "ssl_global").squeeze(-1).tolist() == [12, 18]
    assert layout.patches(x_TD, "clip").squeeze(-1).tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]


def test_equal_settings_give_equal_hashable_layouts() -> None:
    assert hash(packed_layout(CROPS, 16, 1)) == hash(packed_layout(dict(CROPS), 16, 1))
    assert packed_layout(CROPS, 16, 1) != packed_layout(CROPS, 16, 2)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    prefix=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_groups_cover_the_sequence_once_and_padding_ends_it(shapes: list[tuple[int, int, int]], prefix: int) -> None:
    crops = {str(i): (count, 8 * down, 8 * across) for i, (count, down, across) in enumerate(shapes)}
    layout = packed_layout(crops, patch_size=8, prefix=prefix)
    covered = [i for name in crops for i in range(*layout.slice(name).indices(layout.tokens))]
    assert covered == list(range(layout.tokens - layout.pad))
    assert sum(count * length for count, length in layout.segments) == len(covered)
    assert layout.tokens % ALIGN == 0
    assert 0 <= layout.pad < ALIGN


def test_a_crop_that_does_not_hold_whole_patches_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"clip images of 32x40 pixels.*patch size 16"):
        packed_layout({"clip": (1, 32, 40)}, patch_size=16, prefix=1)


def test_an_unknown_group_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        packed_layout(CROPS, 16, 1).slice("text")
