"""A few hundred of the inputs of `make fuzz`: hostile bytes end in a counted reason or one clear error."""

import pytest

from data.shards import Shards
from tests.fuzz import READERS, fuzz

pytestmark = pytest.mark.L0


@pytest.mark.parametrize("reader", READERS)
def test_no_input_makes_a_reader_fail(reader: str) -> None:
    outcomes = fuzz(reader, inputs=400)
    assert outcomes.total() == 400
    assert len(outcomes) > 3, "the inputs are all alike"


def test_a_reader_that_fails_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "label", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fuzz("caption", inputs=100)
