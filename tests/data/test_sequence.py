"""The digest of the samples a run was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.hashing import hash_words
from data.order import Order
from data.sequence import CorpusFacts, chained, sum_of_keys, sum_of_words

pytestmark = pytest.mark.L0

STEPS = [[f"{step:05}/{row}" for row in range(12)] for step in range(4)]
NAMES = ["a/0.tar", "a/1.tar", "a/2.tar"]


def digest(steps: list[list[str]], world_size: int) -> str:
    return chained("", (sum(sum_of_keys(step[rank::world_size]) for rank in range(world_size)) for step in steps))


def test_any_number_of_ranks_and_any_cut_give_one_digest() -> None:
    whole = digest(STEPS, 1)
    assert {digest(STEPS, world_size) for world_size in (2, 3, 4, 5)} == {whole}
    assert chained(digest(STEPS[:1], 2), map(sum_of_keys, STEPS[1:])) == whole
    assert len(whole) == 16
    assert chained("", []) == ""


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
    assert sum_of_words(words) == sum(map(int, words)) % 2**64


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
