"""Packed captions: nothing lost, nothing computed twice, and the tower gives what it gives without packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.text import TextTower, one_caption_per_row, pack_captions
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
CONTEXT = 12
lengths = st.lists(st.integers(1, CONTEXT), min_size=1, max_size=40)


def captions_of(lengths: list[int], vocab: int = 64) -> Tensor:
    """Captions of `lengths` tokens, end-of-text included; what follows it is no zero, to see that it is not read."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(1, vocab - 1, (len(lengths), CONTEXT), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length - 1] = vocab - 1
    return ids


def tower(attention: str) -> TextTower:
    config = tiny_config("model.text.context=12")
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1), attention)
    initialise(model, config)
    assert model.text is not None
    with torch.no_grad():
        for parameter in model.text.resblocks.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)  # lively: at first values blocks hardly change a token
    return model.text


@given(lengths=lengths)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_token_up_to_end_of_text_lies_in_one_slot_beside_its_caption(lengths: list[int]) -> None:
    captions_BC = captions_of(lengths)
    packed = pack_captions(captions_BC)
    rows, width = packed.tokens_RC.shape
    assert width == 16
    tokens, positions, ids = (t.flatten() for t in (packed.tokens_RC, packed.positions_RC, packed.spans.ids_RC))
    for caption, (length, end) in enumerate(zip(lengths, packed.ends_B.tolist(), strict=True)):
        slots = slice(end + 1 - length, end + 1)
        assert tokens[slots].tolist() == captions_BC[caption, :length].tolist()
        assert positions[slots].tolist() == list(range(length))
        assert ids[slots].tolist() == [caption + 1] * length
        assert (end + 1 - length) // width == end // width, "in one row"
    assert int((ids > 0).sum()) == sum(lengths)
    assert not tokens[ids == 0].any()

    offsets = packed.spans.offsets
    assert offsets.shape == (len(lengths) + rows + 1,)
    assert (offsets[0], offsets[-1]) == (0, rows * width)
    sizes = offsets.diff()
    assert (sizes >= 0).all()
    changes = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
    begins = set(changes.tolist()) | set(range(0, rows * width, width))
    assert set(offsets[:-1][sizes > 0].tolist()) == begins


@given(lengths=lengths)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_are_filled_well_and_their_number_is_a_rung(lengths: list[int]) -> None:
    rows = pack_captions(captions_of(lengths)).tokens_RC.shape[0]
    assert rows <= len(lengths)
    # First-fit decreasing needs at most 11/9 of the fewest possible rows and 1 (Dosa 2007); none of these exceeds 32.
    assert rows <= 11 / 9 * -(-sum(lengths) // 16) + 1


def test_many_captions_of_varying_lengths_meet_few_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        drawn = torch.randint(2, CONTEXT + 1, (512,), generator=generator).tolist()
        packed = pack_captions(captions_of(drawn))
        shapes.add(packed.tokens_RC.shape[0])
        assert packed.saved_fraction(captions_of(drawn)) == 1 - packed.tokens_RC.numel() / (512 * CONTEXT)
        assert packed.tokens_RC.numel() < 1.2 * sum(drawn)  # 1/8 for the ladder, the rest for rows not quite full
    assert len(shapes) <= 2


def test_no_captions_are_no_rows() -> None:
    packed = pack_captions(torch.zeros(0, CONTEXT, dtype=torch.int64))
    assert packed.tokens_RC.shape == (0, 16)
    assert packed.ends_B.shape == (0,)
    assert packed.saved_fraction(torch.zeros(0, CONTEXT)) == 0


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_the_tower_gives_packed_captions_the_vectors_and_gradients_of_padded_ones(attention: str) -> None:
    text, captions_BC = tower(attention), captions_of([3, 12, 1, 5, 5, 7, 2, 9, 4, 1])
    results = []
    for packed in (pack_captions(captions_BC), one_caption_per_row(captions_BC)):
        text.zero_grad()
        out_BE = text(packed)
        (out_BE * torch.linspace(-1, 1, out_BE.numel()).view_as(out_BE)).sum().backward()
        results.append((out_BE.detach(), {name: p.grad.clone() for name, p in text.named_parameters()}))
    (packed_BE, packed_grads), (padded_BE, padded_grads) = results
    assert packed_BE.std() > 0.01
    torch.testing.assert_close(packed_BE, padded_BE, rtol=0, atol=1e-5)  # worst seen 6e-7
    for name, grad in padded_grads.items():
        # Worst seen 5e-7 of the largest; a caption that saw its neighbour would be off by a tenth.
        assert (packed_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
