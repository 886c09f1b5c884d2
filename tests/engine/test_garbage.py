"""The garbage collector stays out of the loop and comes back after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from engine.garbage import collected_by_hand

pytestmark = pytest.mark.L0


class Knot:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _collector_as_found() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_inside_nothing_is_collected_but_by_hand_and_only_what_is_new() -> None:
    old = Knot()
    with collected_by_hand():
        assert not gc.isenabled()
        was_there, made_inside = weakref.ref(old), weakref.ref(Knot())
        del old
        assert made_inside() is not None
        gc.collect()
        assert made_inside() is None
        assert was_there() is not None, "what lived before the loop is frozen"
    gc.collect()
    assert was_there() is None, "and thawed after it"


def test_the_collector_is_restored_also_after_an_error() -> None:
    with pytest.raises(KeyError), collected_by_hand():
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collected_by_hand():
        pass
    assert not gc.isenabled()
