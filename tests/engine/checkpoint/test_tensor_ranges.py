"""Pieces: any range comes back from however many files hold it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from engine.checkpoint.tensor_ranges import RangeReader, TensorRange, write_ranges

pytestmark = pytest.mark.L0


@settings(max_examples=30, deadline=None)
@given(numel=st.integers(1, 40), world_size=st.integers(1, 5), data=st.data())
def test_any_range_is_read_back_from_even_shards(
    tmp_path_factory: pytest.TempPathFactory, numel: int, world_size: int, data: st.DataObject
) -> None:
    folder, values = tmp_path_factory.mktemp("pieces"), torch.randn(numel)
    size = -(-numel // world_size)
    for rank in range(world_size):
        own = values[rank * size : (rank + 1) * size]
        pieces = [TensorRange("fp32", "a.weight", rank * size, own)] if len(own) else []
        write_ranges(folder / f"rank-{rank:05d}.safetensors", pieces)
    start = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - start))
    pieces = RangeReader(folder)
    assert torch.equal(pieces.read("fp32", "a.weight", start, count), values[start : start + count])
    assert torch.equal(pieces.read("fp32", "a.weight"), values)


def test_a_hole_between_files_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    write_ranges(tmp_path / "rank-00000.safetensors", [TensorRange("fp32", "w", 0, torch.ones(3))])
    write_ranges(tmp_path / "rank-00001.safetensors", [TensorRange("fp32", "w", 5, torch.ones(3))])
    with pytest.raises(UserError, match="no fp32 of w from 3 to 8"):
        RangeReader(tmp_path).read("fp32", "w")


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    write_ranges(tmp_path / "rank-00000.safetensors", [TensorRange("fp32", "w", 0, torch.ones(3))])
    with pytest.raises(UserError, match="another model"):
        RangeReader(tmp_path).read("fp32", "v", 0, 3)
