"""Items are made ahead, in order; errors reach the consumer; threads end."""

import threading
import time

import pytest

from data.prefetch import Prefetcher

pytestmark = pytest.mark.L0


def test_items_come_in_order_and_no_more_than_depth_ahead() -> None:
    made: list[int] = []
    items = Prefetcher(lambda n: made.append(n) or n * n, start=3, depth=2)  # type: ignore[func-returns-value]
    assert [next(items) for _ in range(4)] == [9, 16, 25, 36]
    time.sleep(0.1)
    assert made == [3, 4, 5, 6, 7, 8]
    items.close()


def test_making_overlaps_with_consuming_and_waiting_is_measured() -> None:
    def slow(n: int) -> int:
        time.sleep(0.05)
        return n

    items = Prefetcher(slow, 0, depth=2)
    next(items)
    waited = items.wait_seconds
    assert waited > 0.02  # nothing was ready
    time.sleep(0.3)
    next(items), next(items)
    assert items.wait_seconds - waited < 0.04  # both were ready
    items.close()


def test_an_error_arrives_in_its_place_and_again() -> None:
    def fails_at_two(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    items = Prefetcher(fails_at_two, 0, depth=4)
    assert [next(items), next(items)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="two"):
            next(items)
    items.close()


def test_closing_ends_the_thread_and_the_iteration() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda n: n, 0, depth=2)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert len(list(items)) <= 2
