"""The order is a permutation per epoch, the same for every world size, and can be entered anywhere."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from data.hashing import hash_text, hash_words, permutation, uniform
from data.order import Order

pytestmark = pytest.mark.L0

corpora = st.builds(
    lambda sizes, streams, block, seed: Order(sizes, min(streams, sum(s > 0 for s in sizes)), block, seed),
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
)


def stream_epoch(order: Order, stream: int, epoch: int) -> list[tuple[int, int]]:
    """(shard, sample) of one epoch of one stream, read position by position from the start."""
    places, number = [], 0
    while (place := order.locate(number * order.streams + stream)).epoch <= epoch:
        if place.epoch == epoch:
            places.append((place.shard_idx, place.sample_idx))
        number += 1
    return places


@given(corpora, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_holds_every_sample_exactly_once_over_all_streams(order: Order, epoch: int) -> None:
    seen = Counter(place for stream in range(order.streams) for place in stream_epoch(order, stream, epoch))
    assert seen == Counter((shard, i) for shard, size in enumerate(order.sizes) for i in range(size))


@given(corpora, st.integers(0, 10**12), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_substitutes_come_from_the_same_stream_and_epoch(order: Order, position: int, attempt: int) -> None:
    position %= 5000  # far positions have a test of their own
    own, filler = order.locate(position), order.substitute(position, attempt)
    assert filler.epoch == own.epoch
    if attempt <= 16:
        number, stream_idx = position // order.streams, position % order.streams
        assert filler.shard_idx in order._find(stream_idx, number).shard_idx
    stream = stream_epoch(order, position % order.streams, own.epoch)
    assert (filler.shard_idx, filler.sample_idx) in stream
    assert filler == Order(order.sizes, order.streams, order.block_shards, order.seed).substitute(position, attempt)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_of_every_world_size_together_serve_the_same_sequence(world_size: int) -> None:
    sizes, positions = [7, 5, 9, 4, 6, 8, 3, 10], np.arange(600)
    whole = np.stack(Order(sizes, 6, 2, 1).locate_many(positions))
    served = np.empty_like(whole)
    for rank in range(world_size):
        mine = positions[rank::world_size]
        served[:, mine] = np.stack(Order(sizes, 6, 2, 1).locate_many(mine))
        shards = [set(served[1, mine][served[0, mine] == 0])]
        assert all(len(s) <= -(-len(sizes) // world_size) + 1 for s in shards)  # a rank reads its own shards only
    assert (served == whole).all()


@given(corpora, st.lists(st.integers(0, 4000), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_positions_can_be_asked_in_any_order(order: Order, positions: list[int]) -> None:
    fresh = [Order(order.sizes, order.streams, order.block_shards, order.seed).locate(g) for g in positions]
    assert [order.locate(g) for g in positions] == fresh


def test_samples_are_shuffled_across_the_shards_of_a_block_and_epochs_differ() -> None:
    order = Order([50] * 4, 1, 4, 0)
    first, second = (stream_epoch(order, 0, epoch) for epoch in (0, 1))
    assert first != second
    assert len({shard for shard, _ in first[:20]}) == 4


def test_another_seed_gives_another_order() -> None:
    assert Order([50] * 4, 2, 2, 0).locate(0) != Order([50] * 4, 2, 2, 3).locate(0)


def test_a_block_touches_only_its_own_shards() -> None:
    order = Order([30] * 8, 1, 2, 0)
    _, shards, _ = order.locate_many(np.arange(240))
    assert all(len(set(shards[start : start + 60])) == 2 for start in range(0, 240, 60))


def test_resume_deep_inside_a_long_run_takes_well_under_a_second() -> None:
    order = Order([9_000 + i % 2000 for i in range(2000)], 64, 4, 0)
    start = time.perf_counter()
    assert order.locate(3 * 10**9).epoch > 100  # measured 0.02 s: 146 epochs of 2,000 shards
    assert time.perf_counter() - start < 2


def test_too_few_shards_for_the_streams_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"2 of 3 shards hold usable samples but data\.streams=3.*lower data\.streams"):
        Order([5, 0, 5], streams=3, block_shards=1, seed=0)


def test_the_hash_is_the_published_splitmix64() -> None:
    # first output of the reference generator seeded with 0 and 1: mix(seed + golden gamma)
    assert [int(hash_words(seed)[0]) for seed in (0, 1)] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert hash_text("00000/000000123") == hash_text("00000/000000123") != hash_text("00000/000000124")


def test_hashed_numbers_are_uniform_and_order_of_words_matters() -> None:
    numbers = uniform(hash_words(7, np.arange(100_000)))
    assert abs(numbers.mean() - 0.5) < 0.003  # measured 0.00001; a standard error is 0.0009
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.01  # measured 0.0005
    assert hash_words(1, 2)[0] != hash_words(2, 1)[0]
    assert sorted(permutation(50, 3)) == list(range(50))
