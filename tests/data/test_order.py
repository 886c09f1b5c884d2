"""The order is a permutation per epoch, the same for every world size, and can be entered anywhere.

The digest of the samples trained on is the same for every world size.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from data.hashing import hash_text, hash_words, permutation, uniform
from data.order import CorpusFacts, Order, chain_digest, sum_hashes, sum_key_hashes

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


STEPS = [[f"{step:05}/{row}" for row in range(12)] for step in range(4)]
NAMES = ["a/0.tar", "a/1.tar", "a/2.tar"]


def digest(steps: list[list[str]], world_size: int) -> str:
    return chain_digest(
        "", (sum(sum_key_hashes(step[rank::world_size]) for rank in range(world_size)) for step in steps)
    )


def test_any_number_of_ranks_and_any_cut_give_one_digest() -> None:
    whole = digest(STEPS, 1)
    assert {digest(STEPS, world_size) for world_size in (2, 3, 4, 5)} == {whole}
    assert chain_digest(digest(STEPS[:1], 2), map(sum_key_hashes, STEPS[1:])) == whole
    assert len(whole) == 16
    assert chain_digest("", []) == ""


@given(st.permutations(range(4)), st.integers(0, 3), st.integers(0, 11))
def test_another_order_of_steps_or_one_other_sample_is_noticed(order: list[int], step: int, row: int) -> None:
    whole = digest(STEPS, 1)
    assert (digest([STEPS[i] for i in order], 1) == whole) == (order == [0, 1, 2, 3])
    changed = [list(keys) for keys in STEPS]
    changed[step][row] = "another"
    assert digest(changed, 1) != whole
    assert digest(STEPS[:step] + STEPS[step + 1 :], 1) != whole, "a step lost"
    assert digest(STEPS[: step + 1] + STEPS[step:], 1) != whole, "a step twice"


def test_words_are_summed_as_keys_are() -> None:
    words = hash_words(np.arange(10))
    assert sum_hashes(words) == sum(map(int, words)) % 2**64


def test_facts_name_what_has_changed() -> None:
    def changed(names: list[str], order: Order, position: int = 40) -> set[str]:
        before = CorpusFacts(NAMES, Order([20, 30, 40], 2, 1, 0)).at(40)
        after = CorpusFacts(names, order).at(position)
        return {name for name in before if before[name] != after[name]}

    moved = ["elsewhere/0.tar", "elsewhere/1.tar", "elsewhere/2.tar"]
    assert changed(moved, Order([20, 30, 40], 2, 1, 0)) == set()
    assert changed(NAMES, Order([20, 30, 40], 2, 1, 1)) == {"order of the next samples"}
    assert changed(NAMES, Order([20, 30, 40], 2, 1, 0), 41) == {"order of the next samples"}
    assert {"samples", "names and sizes of the shards"} <= changed(NAMES, Order([20, 30, 39], 2, 1, 0))
    assert changed(["a/0.tar", "a/1.tar", "a/9.tar"], Order([20, 30, 40], 2, 1, 0)) == {"names and sizes of the shards"}
    assert "shards" in changed([*NAMES, "a/3.tar"], Order([20, 30, 40, 1], 2, 1, 0))
